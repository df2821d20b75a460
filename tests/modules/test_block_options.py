"""Options of blocks, and of filters, as arguments of the models."""

from functools import partial

import pytest
import torch
from tiny import fit, tiny_digits, tiny_pcnn

from pcnn_lightning import BNN, MCN, PCNN
from pcnn_lightning.deploy import load_packed, save_packed
from pcnn_lightning.modules import describe

OPTIONS = {"activation_threshold": True, "two_slopes": True}


@pytest.mark.parametrize("family", ["PCNN", "BNN"])
def test_what_the_options_add_is_learned_and_packed(family):
    if family == "PCNN":
        model = tiny_pcnn(normalization="standardize", **OPTIONS)
    else:
        model = BNN(backbone="wrn7", in_channels=1, widths=[2, 2, 2, 2], **OPTIONS)
    block, data = model.net.features.stage2[0], tiny_digits()
    fit(model, data)
    assert block.activation.is_set
    for values, first in ((block.activation.threshold, 0.0), (block.prelu.positive, 1.0), (block.prelu.negative, 0.25)):
        assert (values != first).all()
    save_packed(model.eval().net, "network.safetensors", describe(model, data))
    loaded, images = load_packed("network.safetensors"), torch.randn(4, 1, 8, 8)
    assert loaded.description.block == OPTIONS
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_files_without_options_are_as_before():
    model = tiny_pcnn()
    assert model.block == {}
    assert "block" not in describe(model, tiny_digits()).as_dict()


def test_normalization_reaches_every_layer():
    layers = tiny_pcnn(normalization="center").one_bit_layers.values()
    assert {layer.normalization for layer in layers} == {"center"}
    with pytest.raises(ValueError, match="normalization must be one of none, center, standardize, but got 'batch'"):
        tiny_pcnn(normalization="batch")


def test_the_full_precision_twin_keeps_the_slopes_and_has_no_thresholds():
    twin = tiny_pcnn(**OPTIONS).twin()
    assert twin.block == {"two_slopes": True}
    names = [name for name, _ in twin.net.named_parameters()]
    assert "features.stage1.0.prelu.positive" in names
    assert not any("threshold" in name for name in names)


REAL = "must be false, since this model has real activations, but got True"
REFUSED = {
    "MCN": (partial(MCN, backbone="wrn7"), REAL),
    "BWN": (partial(BNN, sign_activations=False), REAL),
    "mcn8": (partial(PCNN, backbone="mcn8"), "must be false for backbone mcn8, which has no blocks with options"),
    "torchvision": (
        partial(BNN, backbone="torchvision/resnet18"),
        "is for networks of this package, not for torchvision/resnet18, but got True",
    ),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_thresholds_without_signs_or_blocks_are_refused(model, message):
    with pytest.raises(ValueError, match=f"^activation_threshold {message}"):
        model(activation_threshold=True)
