"""MCN's own part of the loop; what it shares with PCNN is tested there."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import fit, tiny_digits, tiny_mcn
from torch.nn import functional as F

from pcnn_lightning import MCN, PCNN, ModulatedConv2d, StageSwitch
from pcnn_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


class Record(Callback):
    """What a run's metrics and k-means centres were, epoch by epoch and batch by batch."""

    def __init__(self):
        self.metrics, self.centers = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.centers.append([layer.centers.tolist() for layer in pl_module.modulated_layers if layer.levels > 2])

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append(dict(trainer.callback_metrics))


def test_the_logged_names():
    trainer = fit(tiny_mcn(center_loss_weight=1e-3))
    assert set(trainer.callback_metrics) == {
        *(f"train/{name}" for name in ("loss", "cross_entropy", "filter_loss", "center_loss", "accuracy")),
        *(f"val/{name}" for name in ("loss", "cross_entropy", "filter_loss", "center_loss", "accuracy")),
        "lr/kernels",
        "lr/modulations",
        "stage",
    }


@pytest.mark.parametrize("average", [False, True])
def test_a_run_equals_one_written_by_hand(average):
    """Two plain SGDs with an exponential decay each, autograd for 3.18, and the same batches."""
    arguments = {"average": average, "filter_loss_weight": 0.01, "weight_decay": 1e-3}
    rates = {"schedule": "exponential", "decay": 0.5, "projection_decay": 0.25}
    model = tiny_mcn(**arguments, **rates)
    twin = tiny_mcn(**arguments)
    twin.load_state_dict(model.state_dict())
    fit(model, tiny_digits(), max_epochs=2)

    data = tiny_digits()
    data.setup("fit")
    layers = [layer for layer in twin.modules() if isinstance(layer, ModulatedConv2d)]
    filters = {id(layer.modulation) for layer in layers}
    others = [p for p in twin.parameters() if id(p) not in filters]
    kernels = torch.optim.SGD(others, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    modulations = torch.optim.SGD([layer.modulation for layer in layers], 0.01, momentum=0.9, nesterov=True)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        kernels.param_groups[0]["lr"], modulations.param_groups[0]["lr"] = 0.05 * 0.5**epoch, 0.01 * 0.25**epoch
        for raw in loader:
            images, labels = data.on_after_batch_transfer(raw, 0)
            loss = F.cross_entropy(twin(images), labels)
            for layer in layers:
                planes = layer.modulation.abs()
                if average:
                    planes = planes.mean(dim=(1, 2), keepdim=True)
                signs = torch.where(layer.weight.detach() < 0, -1.0, 1.0)
                quantized = layer.weight.detach().abs().mean() * signs
                for plane in planes:
                    loss = loss + 0.005 * (layer.weight - quantized * plane).square().sum()
            kernels.zero_grad()
            modulations.zero_grad()
            loss.backward()
            kernels.step()
            modulations.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_centres_are_found_once_an_epoch():
    record = Record()
    fit(tiny_mcn(levels=3, eta1=0.1), max_epochs=3, callbacks=[record])  # 4 batches an epoch
    epochs = [record.centers[4 * epoch : 4 * epoch + 4] for epoch in range(3)]
    assert all(batch == epoch[0] for epoch in epochs for batch in epoch)
    assert epochs[0][0] != epochs[1][0] != epochs[2][0]


@pytest.mark.parametrize("steps", [4, 6], ids=["at an epoch's end", "within an epoch"])
def test_a_resumed_run_has_the_centres_of_one_that_was_not(tmp_path, steps):
    torch.manual_seed(0)
    whole = tiny_mcn(levels=4, center_loss_weight=0.01)
    torch.manual_seed(0)
    first = tiny_mcn(levels=4, center_loss_weight=0.01)
    fit(whole, max_epochs=3)
    keep = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=steps, save_top_k=-1)
    fit(first, max_epochs=3, max_steps=steps, callbacks=[keep], enable_checkpointing=True)
    torch.manual_seed(1)
    resumed = tiny_mcn(levels=4, center_loss_weight=0.01)
    fit(resumed, max_epochs=3, ckpt_path=str(tmp_path / "x.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(("arguments", "stage"), [({"levels": 4}, "binary"), ({"binarize": False}, "full_precision")])
def test_a_checkpoint_loads_alone(tmp_path, arguments, stage):
    model = tiny_mcn(**arguments, center_loss_weight=0.1)
    fit(model).save_checkpoint(tmp_path / "x.ckpt")
    loaded = MCN.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.stage == stage
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_center_loss_may_begin_at_an_epoch():
    record, model = Record(), tiny_mcn(center_loss_weight=0.1, center_loss_start=1)
    fit(model, max_epochs=1)
    assert not model.center_loss.centers.any()
    fit(model, max_epochs=2, callbacks=[record])
    assert model.center_loss.centers.any()
    assert ["train/center_loss" in metrics for metrics in record.metrics] == [False, True]


def test_dropout_reaches_the_backbone():
    rates = {module.p for module in tiny_mcn(dropout=0.3).modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.3}


def test_a_switch_of_stages_leaves_it_alone():
    model = tiny_mcn()
    trainer = fit(model, max_epochs=3, callbacks=[StageSwitch(epoch=1)])
    assert float(trainer.callback_metrics["stage"]) == 2
    assert model.stage_start == 0  # its schedule is laid over the whole run


@pytest.mark.parametrize(("config", "family"), [("digits", MCN), ("mcn_digits", PCNN)])
def test_the_family_is_one_line_of_a_config(tmp_path, monkeypatch, config, family):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pcnn_lightning"])
    files = [f"--config={CONFIGS / config}.yaml", f"--model={family.__name__}", "--model.stages=[2,2,2,2]"]
    cli = main(["fit", *files, "--trainer.max_epochs=2", "--trainer.limit_train_batches=2"])
    assert type(cli.model) is family
    assert cli.trainer.global_step == 4
    folder = tmp_path / "runs" / config
    assert {file.name for file in (folder / "version_0").glob("losses.*")} == {"losses.csv", "losses.png"}
    assert (folder / "checkpoints" / "binary.ckpt").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"planes": 0}, "planes must be at least 1, but got 0"),
        ({"levels": 5}, "levels must be 2, 3 or 4, but got 5"),
        ({"levels": 3, "scale": 0.1}, "scale is of two levels, but levels is 3"),
        ({"scale": 0.0}, "scale must be a positive number or None, but got 0.0"),
        ({"filter_loss_weight": -1.0}, "filter_loss_weight must be a number of at least 0, but got -1.0"),
        ({"modulation_init": "zeros"}, "modulation_init must be one of .*, but got 'zeros'"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), but got 1.0"),
        ({"backbone": "wrn7", "dropout": 0.1}, "dropout must be 0 for backbone wrn7"),
        ({"center_loss_start": -1}, "center_loss_start must be an epoch or binary, but got -1"),
        ({"center_loss_start": "ternary"}, "center_loss_start must be an epoch or binary, but got 'ternary'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_mcn(**arguments)
