"""Plain binary networks."""

import copy
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Stop, fit, tiny_digits
from torch import nn
from torch.nn import functional as F

from pcnn_lightning import BNN, BinaryConv2d, LossCurves, SignActivation, StageCheckpoint, StageSwitch
from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.deploy import compile_c, compile_openvino, freeze, load_packed, save_packed
from pcnn_lightning.modules import describe
from pcnn_lightning.reports import summarize

KINDS = {
    "XNOR-Net": {},
    "Bi-Real Net": {"activation_gradient": "polynomial"},
    "BWN": {"sign_activations": False},
    "one scale": {"scaling": "layer"},
    "no scale": {"scaling": "none", "weight_gradient": "identity", "gradient_clip": 1.0},  # diverges unclipped
    "standardized": {"normalization": "standardize"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def tiny_bnn(**arguments):
    defaults = {"in_channels": 1, "backbone": "wrn7", "widths": [4, 4, 8, 8], "schedule": "constant", "eta1": 0.05}
    return BNN(**{**defaults, **arguments})


def test_it_logs_one_learning_rate_and_no_quantization_loss():
    trainer = fit(tiny_bnn(center_loss_weight=1e-3))
    assert set(trainer.callback_metrics) == {
        *(f"train/{name}" for name in ("loss", "cross_entropy", "center_loss", "accuracy")),
        *(f"val/{name}" for name in ("loss", "cross_entropy", "center_loss", "accuracy")),
        *("lr/kernels", "stage"),
    }


def test_it_has_no_hyperparameters_of_a_second_rate():
    hparams = tiny_bnn().hparams
    assert not [name for name in hparams if name == "eta2" or name.startswith("projection")]
    with pytest.raises(TypeError, match="eta2"):
        tiny_bnn(eta2=0.1)


@kinds
def test_each_kind_has_its_layers_and_learns(kind):
    torch.manual_seed(0)
    model = tiny_bnn(schedule="cosine", widths=[8, 8, 16, 16], **KINDS[kind])
    signs = any(isinstance(module, SignActivation) for module in model.net.modules())
    assert signs == (kind != "BWN")
    assert all(isinstance(layer, BinaryConv2d) for layer in model.one_bit_layers.values())
    trainer = fit(model, tiny_digits(train_size=800), max_epochs=8)
    assert trainer.callback_metrics["val/accuracy"] > 0.4  # chance is 0.1
    for layer in model.one_bit_layers.values():
        for kernel in layer.quantized_weight():
            assert len(kernel.unique()) == 2


@kinds
def test_files_agree_with_the_trained_network(kind, tmp_path):
    model = tiny_bnn(**KINDS[kind])
    data = tiny_digits()
    fit(model, data)
    model.eval()
    data.setup("test")
    images, x = (
        data.test_set.images[:50],
        data.on_after_batch_transfer(data.test_set.__getitems__(list(range(50))), 0)[0],
    )
    with torch.no_grad():
        expected = model(x)
    save_packed(model.net, tmp_path / "bnn.safetensors", describe(model, data))
    packed = load_packed(tmp_path / "bnn.safetensors")
    assert torch.equal(packed(packed.preprocess(images)), expected)
    assert torch.equal(freeze(model.net)(x), expected)
    counted = summarize(model.net, (1, 8, 8)).total.bits / 8
    assert 0 < (tmp_path / "bnn.safetensors").stat().st_size - counted < 1000
    for fast in (compile_openvino(packed), compile_c(packed)):
        assert torch.equal(fast.classify(images), expected.argmax(1))


def test_only_layers_on_signs_have_1_bit_multiplications():
    for kind, binary in (("XNOR-Net", True), ("BWN", False)):
        total = summarize(tiny_bnn(**KINDS[kind]).net, (1, 8, 8)).total
        assert (total.macs_1bit > 0) == binary
        assert total.parameters_1bit == 9 * (4 * 4 + 4 * 8 + 8 * 8)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_takes_every_backbone(backbone):
    widths = {"vgg": [4, 6, 8], "res": [4, 4, 6, 8, 8]}.get(backbone[:3], [4, 4, 6, 8])
    model = tiny_bnn(backbone=backbone, widths=widths).eval()
    assert model.one_bit_layers
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 10)
    twin = model.twin()
    assert not twin.one_bit_layers
    shapes = [layer.weight.shape for layer in model.one_bit_layers.values()]
    ordinary = [module.weight.shape for module in twin.net.modules() if isinstance(module, nn.Conv2d)]
    assert all(shape in ordinary for shape in shapes)


def test_training_equals_a_manual_loop():
    """One step of SGD on cross-entropy, with the straight-through gradient written out."""
    torch.manual_seed(0)
    model = tiny_bnn(momentum=0.0, nesterov=False, weight_decay=0.0).double()
    data = tiny_digits(train_size=16, batch_size=16, crop_padding=0)
    data.setup("fit")
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    manual = copy.deepcopy(model.net).train()
    F.cross_entropy(manual(images.double()), labels).backward()
    with torch.no_grad():
        for parameter in manual.parameters():
            parameter -= 0.05 * parameter.grad
    fit(model, tiny_digits(train_size=16, batch_size=16, crop_padding=0))
    for (name, ours), theirs in zip(model.net.named_parameters(), manual.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)


def test_a_resumed_run_ends_bit_equal(tmp_path):
    def run(callbacks, **arguments):
        torch.manual_seed(0)
        model = tiny_bnn(schedule="cosine", center_loss_weight=0.01)
        keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
        fit(model, max_epochs=2, callbacks=[keep, *callbacks], enable_checkpointing=True, **arguments)
        return model

    whole = run([])
    with pytest.raises(RuntimeError, match="killed"):
        run([Stop(3)])
    resumed = run([], ckpt_path=str(tmp_path / "last.ckpt"))
    for name, value in whole.state_dict().items():
        if not name.startswith("train_means"):
            assert torch.equal(resumed.state_dict()[name], value), name


def test_the_stage_switch_leaves_it_alone_and_its_curves_are_drawn(tmp_path):
    model = tiny_bnn()
    callbacks = [StageSwitch(1), LossCurves(), StageCheckpoint(dirpath=str(tmp_path / "kept"))]
    fit(model, max_epochs=2, callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
    assert model.stage == "binary"
    assert set(json.loads((tmp_path / "kept" / "stages.json").read_text())) == {"binary"}
    assert Path(tmp_path / "losses.png").is_file()
    assert BNN.load_from_checkpoint(tmp_path / "kept" / "binary.ckpt").stage == "binary"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling": "filter"}, "scaling must be one of layer, channel, none, but got 'filter'"),
        ({"weight_gradient": "polynomial"}, "gradient must be one of clip, identity, scaled, but got 'polynomial'"),
        ({"activation_gradient": "identity"}, "gradient must be one of clip, polynomial, but got 'identity'"),
        ({"normalization": "batch"}, "normalization must be one of none, center, standardize, but got 'batch'"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_bnn(**arguments)
