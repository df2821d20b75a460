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
    "converted": {
        "backbone": "wrn7",
        "widths": None,
        "network": "tiny.TinyNetwork",
        "projections": 1,
        "image_size": [8, 8],
        "convert": {"include": "re:main|last", "activations": "threshold"},
    },
}


def data():
    images = tiny_digits()
    images.setup("fit")
    return images


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_of_1_bit_on_real_activations(tmp_path, name):
    torch.manual_seed(0)
    model = tiny_pcnn(**NETWORKS[name]).eval()
    model.take_stage("binary", Stage("binary", activations="real"))
    images = torch.randn(4, 1, 8, 8)
    expected = model(images)
    description = describe(model, data())
    assert not description.sign_activations
    save_packed(model.net, tmp_path / "x.safetensors", description)
    loaded = load_packed(tmp_path / "x.safetensors", TinyNetwork if name == "converted" else None)
    assert torch.equal(loaded(images), expected)


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
