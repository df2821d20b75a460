from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Stop, fit, tiny_digits, tiny_mcn, tiny_pcnn, tiny_trainer
from torch.utils.data import DataLoader, TensorDataset

from pcnn_lightning import ProjectionConv2d, StageSwitch
from pcnn_lightning.callbacks import diversity
from pcnn_lightning.callbacks.diversity import Diversity, draw_diversity, evaluating, kernel_diversity
from pcnn_lightning.errors import InputError

MODELS = {
    "PCNN": lambda: tiny_pcnn(widths=[4, 4, 4, 4], projections=4),
    "MCN": lambda: tiny_mcn(widths=[4, 4, 4, 4], planes=4),
    "MCN-1": lambda: tiny_mcn(average=True),
    "U-MCN": lambda: tiny_mcn(binarize=False),
}


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of each figure, [(image, kernels, maps, title)], instead of the slow drawing."""
    figures = []

    def note(*figure):
        figures.append(figure)
        return Figure((1, 1))

    monkeypatch.setattr(diversity, "draw_diversity", note)
    return figures


class KeepKernels(Callback):
    """Record the kernels of the first 1-bit layer at the end of each epoch."""

    def __init__(self):
        self.kernels = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.kernels.append(next(iter(pl_module.one_bit_layers.values())).quantized_weight())


def raw_image(images, index):
    """Pixels of one image of a set, normalised by hand."""
    pixels = images.images[images.indices[index]].float() / 255
    return (pixels - 0.3049) / 0.3185


def pngs(folder="."):
    return sorted(path.name for path in Path(folder).glob("*.png"))


# Contents.


def test_pcnn_figure_matches_its_equations(drawn):
    model, data = MODELS["PCNN"](), tiny_digits(crop_padding=2, flip=True)
    fit(model, data, max_epochs=2, callbacks=[Diversity(image=3)])
    (image, kernels, maps, title), *others = drawn
    assert not others
    assert title == "features.stage1.0.conv, binary stage, after epoch 1"
    assert torch.allclose(image, raw_image(data.val_set, 3), atol=1e-6)

    block = model.eval().net.features.stage1[0]
    c, w = block.conv.weight.detach(), block.conv.projection.detach()
    expected = torch.stack([c.abs().mean() * torch.where(w[j] * c[0] >= 0, 1.0, -1.0) for j in range(4)])
    assert torch.equal(kernels, expected[:, 0])
    with torch.no_grad():
        signs = torch.where(block.norm(model.net.features.stem(image[None])) >= 0, 1.0, -1.0)
        assert torch.allclose(maps, F.conv2d(signs, expected, padding=1)[0], atol=1e-5)


def test_mcn_figure_matches_its_equations(drawn):
    model, data = MODELS["MCN"](), tiny_digits()
    fit(model, data, callbacks=[Diversity(channels=3)])
    ((image, kernels, maps, _),) = drawn
    assert torch.allclose(image, raw_image(data.val_set, 0), atol=1e-6)
    c, m = model.net.features.stem.weight.detach(), model.net.features.stem.modulation.detach()
    binary = c.abs().mean() * torch.where(c[0] >= 0, 1.0, -1.0)
    expected = torch.stack([binary * m[k].abs() for k in range(3)])
    assert torch.allclose(kernels, expected[:, 0])
    assert torch.allclose(maps, F.conv2d(image.repeat(4, 1, 1)[None], expected, padding=1)[0], atol=1e-5)


def test_without_validation_images_one_to_train_on_is_shown_as_it_is(drawn):
    data = tiny_digits(val_fraction=0.0, crop_padding=3, flip=True)
    fit(tiny_mcn(), data, callbacks=[Diversity(image=5)])
    assert torch.allclose(drawn[0][0], raw_image(data.train_set, 5), atol=1e-6)


def test_a_validation_image_is_shown_though_validation_comes_later(drawn):
    data = tiny_digits()
    fit(tiny_mcn(), data, max_epochs=2, check_val_every_n_epoch=2, callbacks=[Diversity()])
    assert torch.allclose(drawn[0][0], raw_image(data.val_set, 0), atol=1e-6)


def test_unaugmented_data_set_is_used(drawn):
    plain = TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)

    class Noisy(TensorDataset):
        def unaugmented(self):
            return plain

    noisy = Noisy(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)
    tiny_trainer(callbacks=[Diversity(image=7)]).fit(tiny_mcn(), DataLoader(noisy, batch_size=16))
    assert torch.equal(drawn[0][0], plain[7][0])


@pytest.mark.parametrize("with_validation", [True, False])
def test_loaders_without_a_data_module(drawn, with_validation):
    images, labels = torch.randn(2, 32, 1, 8, 8), torch.arange(32) % 10
    train, val = (DataLoader(TensorDataset(split, labels), batch_size=16, shuffle=True) for split in images)
    tiny_trainer(callbacks=[Diversity(image=7)]).fit(tiny_mcn(), train, [val] if with_validation else None)
    assert torch.equal(drawn[0][0], images[int(with_validation), 7])


def test_another_layer_is_shown_under_its_name(drawn):
    fit(MODELS["MCN"](), callbacks=[Diversity(), Diversity("features.stage2.0.shortcut.conv")])
    assert pngs() == ["diversity_binary.png", "diversity_features.stage2.0.shortcut.conv_binary.png"]
    _, kernels, maps, title = drawn[1]
    assert (len(kernels), len(maps)) == (4, 4)  # one plane: of four latent kernels
    assert title.startswith("features.stage2.0.shortcut.conv, ")


def test_compiled_network_is_drawn_uncompiled(drawn):
    model = MODELS["MCN"]()
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    model.net.features.compile(backend=backend)
    fit(model, callbacks=[Diversity()], limit_val_batches=0, limit_train_batches=2)
    assert drawn[0][2].shape == (4, 8, 8)
    assert len(compiled) == 1, "only for training"


# Epochs and stages.


@pytest.mark.parametrize("first", [True, False], ids=["before the switch", "after the switch"])
def test_each_stage_is_shown_as_it_ended(drawn, first):
    still, callbacks = KeepKernels(), [Diversity(), StageSwitch(2)]
    model = tiny_pcnn(stage="ternary", reinit_projection=True)
    fit(model, max_epochs=4, callbacks=[still, *callbacks[:: 1 if first else -1]])
    assert pngs() == ["diversity_binary.png", "diversity_ternary.png"]
    for (_, kernels, _, title), stage, epoch in zip(drawn, ("ternary", "binary"), (1, 3), strict=True):
        assert title == f"features.stage1.0.conv, {stage} stage, after epoch {epoch}"
        assert torch.equal(kernels, still.kernels[epoch][:2, 0])


def test_a_run_resumed_at_the_end_of_a_stage_shows_that_stage_too(tmp_path, drawn):
    def run(folder, *more, **arguments):
        torch.manual_seed(0)
        model, kept = tiny_pcnn(stage="ternary"), ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        trainer = {"enable_checkpointing": True, "default_root_dir": folder, **arguments}
        fit(model, max_epochs=3, callbacks=[StageSwitch(1), Diversity(), kept, *more], **trainer)

    run("whole")
    whole = drawn.copy()
    drawn.clear()
    with pytest.raises(RuntimeError, match="killed"):
        run("first", Stop(4))
    assert pngs("first") == ["diversity_ternary.png"]
    drawn.clear()
    run("second", ckpt_path=str(tmp_path / "last.ckpt"))
    assert pngs("second") == pngs("whole") == ["diversity_binary.png", "diversity_ternary.png"]
    for resumed, expected in zip(drawn, whole, strict=True):
        assert all(torch.equal(*tensors) for tensors in zip(resumed[:3], expected[:3], strict=True))
        assert resumed[3] == expected[3]


def test_a_broken_run_shows_its_last_whole_epoch(drawn):
    still = KeepKernels()
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_mcn(), max_epochs=3, callbacks=[still, Diversity(), Stop(6)])
    assert drawn[0][3] == "features.stem, binary stage, after epoch 0"
    assert torch.equal(drawn[0][1], still.kernels[0][:2, 0])


def test_diverged_network_can_be_drawn():
    nan = torch.tensor([float("nan"), float("inf"), 1.0]).expand(2, 3, 3)
    draw_diversity(nan[:1], nan, nan, "nan").savefig("nan.png")


def test_tensorboard_has_figure_and_diversity(tmp_path):
    logger, still = TensorBoardLogger(tmp_path, name="run"), KeepKernels()
    model = tiny_pcnn(stage="ternary", projections=2)
    fit(model, max_epochs=2, callbacks=[StageSwitch(1), still, Diversity()], logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [image.step for image in events.Images("diversity")] == [3, 7], "the last batches of the stages"
    values = [scalar.value for scalar in events.Scalars("diversity/features.stage1.0.conv")]
    assert values == pytest.approx([kernel_diversity(kernels, 2).item() for kernels in still.kernels])
    assert pngs(logger.log_dir) == ["diversity_binary.png", "diversity_ternary.png"]


def test_a_layer_of_one_plane_has_no_diversity_and_shows_its_first_kernels(drawn):
    model = tiny_pcnn(projections=1)
    trainer = fit(model, callbacks=[Diversity(channels=2)])
    assert not any(name.startswith("diversity") for name in trainer.callback_metrics)
    layer = next(iter(model.one_bit_layers.values()))
    assert torch.equal(drawn[0][1], layer.quantized_weight()[:2, 0])


# Side effects.


@pytest.mark.parametrize("model", MODELS)
def test_training_is_the_same_bit_for_bit(drawn, model):
    ends = []
    for callbacks in ([], [Diversity()]):
        torch.manual_seed(0)
        trained = MODELS[model]()
        data = tiny_digits(val_fraction=0.0, crop_padding=1)
        fit(trained, data, max_epochs=2, limit_train_batches=2, callbacks=callbacks)
        ends.append({**trained.state_dict(), "random state": torch.get_rng_state()})
    assert drawn
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


def test_modes_random_state_and_pending_losses_are_kept(drawn):
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.net.features.norm.eval()
            self.modes = {name: module.training for name, module in pl_module.named_modules()}
            self.random = torch.get_rng_state()
            pl_module(torch.randn(4, 1, 8, 8, generator=torch.Generator()))
            self.losses = [layer._loss_of_forward for layer in pl_module.one_bit_layers.values()]
            self.buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}

    class Check(Callback):
        def on_train_start(self, trainer, pl_module):
            assert {name: module.training for name, module in pl_module.named_modules()} == look.modes
            assert torch.equal(torch.get_rng_state(), look.random)
            losses = [layer._loss_of_forward for layer in pl_module.one_bit_layers.values()]
            assert all(loss is kept is not None for loss, kept in zip(losses, look.losses, strict=True))
            for name, buffer in pl_module.named_buffers():
                assert torch.equal(buffer, look.buffers[name]), name

    look = Look()
    images = TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)
    trainer = tiny_trainer(callbacks=[look, Diversity(), Check()], max_steps=1)
    trainer.fit(tiny_mcn(), DataLoader(images, batch_size=16))


def test_modes_are_restored_after_an_error():
    model = tiny_mcn()

    def fail():
        assert not any(module.training for module in model.modules())
        raise RuntimeError("no forward pass")

    with pytest.raises(RuntimeError, match="no forward pass"), evaluating(model):
        fail()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("model", "trainer"),
    [(lambda: tiny_pcnn(full_precision=True), {}), (tiny_mcn, {"fast_dev_run": True})],
    ids=["without 1-bit layers", "fast_dev_run"],
)
def test_no_files_without_one_bit_layers_or_in_fast_dev_run(tmp_path, model, trainer):
    fit(model(), callbacks=[Diversity()], **trainer)
    assert list(tmp_path.iterdir()) == []


def test_unknown_layers_and_images_are_refused():
    with pytest.raises(InputError, match=r"no 1-bit layer stem; there are features\.stage1\.0\.conv"):
        fit(tiny_pcnn(), callbacks=[Diversity("stem")])
    with pytest.raises(InputError, match="image must be below 144, the number of images, but got 144"):
        fit(tiny_pcnn(), callbacks=[Diversity(image=144)])
    with pytest.raises(ValueError, match="channels must be an integer of at least 1, but got 0"):
        Diversity(channels=0)
    with pytest.raises(ValueError, match="image must be an integer of at least 0, but got -1"):
        Diversity(image=-1)


# The diversity itself.


@pytest.mark.parametrize("stage", ["binary", "ternary"])
def test_diversity_is_one_minus_the_mean_cosine_of_pairs(stage):
    layer = ProjectionConv2d(5, 12, 3, projections=4, stage=stage)
    kernels = layer.quantized_weight().double()
    pairs = [(o * 4 + j, o * 4 + i) for o in range(3) for j, i in combinations(range(4), 2)]
    cosines = [F.cosine_similarity(kernels[j].flatten(), kernels[i].flatten(), dim=0) for j, i in pairs]
    expected = 1 - torch.stack(cosines).abs().mean()
    assert kernel_diversity(kernels, 4).item() == pytest.approx(expected.item())
    if stage == "binary":
        shares = torch.stack([((kernels[j] > 0) != (kernels[i] > 0)).double().mean() for j, i in pairs])
        assert kernel_diversity(kernels, 4).item() == pytest.approx((1 - (1 - 2 * shares).abs()).mean().item())


def test_kernels_equal_up_to_sign_have_zero_diversity():
    layer = ProjectionConv2d(5, 12, 3, projections=4, projection_forward="mean", projection_init="normal")
    assert kernel_diversity(layer.quantized_weight().double(), 4).item() == pytest.approx(0, abs=1e-12)


# The figure.


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_the_picture_has_an_image_and_a_column_a_channel(channels):
    kernels = torch.randn(4, 3, 3)
    maps = torch.randn(4, 8, 6)
    figure = draw_diversity(torch.randn(channels, 16, 12), kernels, maps, "title")
    image, *panels = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    assert image.get_xlabel() == "12 × 16 pixels"
    shown = [torch.as_tensor(axes.get_images()[0].get_array().data) for axes in panels]
    expected = [*kernels, *maps, *(torch.where(values >= 0, 1.0, -1.0) for values in maps)]
    assert all(torch.equal(first, second) for first, second in zip(shown, expected, strict=True))
    limits = [axes.get_images()[0].get_clim() for axes in panels]
    largest = [kernels.abs().max().item()] * 4 + [maps.abs().max().item()] * 4 + [1.0] * 4
    assert limits == [(-most, most) for most in largest]
