"""Packed files of networks that were trained in other stages than the usual ones."""

import pytest
import torch
from tiny import TinyNetwork, tiny_digits, tiny_pcnn

from pcnn_lightning.deploy import load_packed, save_packed
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules.packed import describe
from pcnn_lightning.stages import Stage

NETWORKS = {
    "ours": {},
    "mcn8, whose signs replace ReLUs": {"backbone": "mcn8"},
    "mcn_small, whose signs replace ReLUs": {"backbone": "mcn_small", "projections": 1},
    "converted": {
        "backbone": "wrn7",
        "widths": None,
        "network": "tiny.TinyNetwork",
        "projections": 1,
        "image_size": [8, 8],
        "convert": {"include": "re:main|last", "activations": "threshold"},
    },
}


def fit_norms(model):
    """Give the batch norms other statistics and parameters than those that they are made with."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.detach(), module.bias.detach()):
                tensor.copy_(torch.randn_like(tensor))


def data():
    images = tiny_digits()
    images.setup("fit")
    return images


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_of_1_bit_on_real_activations(tmp_path, name):
    torch.manual_seed(0)
    model = tiny_pcnn(**NETWORKS[name]).eval()
    fit_norms(model)
    model.take_stage("binary", Stage("binary", activations="real"))
    images = torch.randn(4, 1, 8, 8)
    expected = model(images)
    description = describe(model, data())
    assert not description.sign_activations
    save_packed(model.net, tmp_path / "x.safetensors", description)
    loaded = load_packed(tmp_path / "x.safetensors", TinyNetwork if name == "converted" else None)
    assert torch.equal(loaded(images), expected)


def test_a_converted_twin_is_described_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = tiny_pcnn(**NETWORKS["converted"], full_precision=True).eval()
    description = describe(model, data())
    assert description.conversion is not None
    assert (description.stage, description.conversion["activations"]) == ("full_precision", "real")
    save_packed(model.net, tmp_path / "x.safetensors", description)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(load_packed(tmp_path / "x.safetensors", TinyNetwork)(images), model(images))


def test_a_network_between_two_stages_is_refused():
    model = tiny_pcnn()
    model.set_stage("ternary")
    model.take_stage("binary", Stage("binary", layer_by_layer=0.5))
    model.enter_layers(1)
    with pytest.raises(InputError, match="only some of the layers have entered stage binary: train on"):
        describe(model, data())


def test_real_kernels_are_refused():
    model = tiny_pcnn(stage="real")
    with pytest.raises(InputError, match="ProjectionConv2d has no 1-bit kernels in stage real: train on to binary"):
        describe(model, data())
