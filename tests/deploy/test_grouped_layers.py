"""Frozen layers with groups and a bias in files and runtimes: single layers, and networks of depthwise layers."""

import dataclasses
import math
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from agreement import assert_agree, logits_of, smallest_signed
from c_programs import build, needs, randomise, run_program, write_program
from openvino_networks import layers_of, raw_images
from packed_files import parts_of
from torch import nn

from pcnn_lightning import BNN, MCN, PCNN, BinaryConv2d, OneBitClassifier
from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.backbones.blocks import full_precision_stem, pooled
from pcnn_lightning.backbones.mcn import PlaneConv
from pcnn_lightning.deploy import (
    PackedNetwork,
    compile_openvino,
    freeze,
    load_packed,
    save_onnx,
    save_packed,
    save_torch,
)
from pcnn_lightning.deploy.c.source import to_c
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import FrozenBatchNorm2d, FrozenConv2d, FrozenModulatedConv2d, SignActivation
from pcnn_lightning.modules import describe

GROUPS: dict[str, Any] = {"groups": 4, "bias": True}
LAYERS = {
    "real": FrozenConv2d(8, 12, 3, 1, 1, **GROUPS),
    "real, ternary": FrozenConv2d(8, 12, 3, 2, 1, levels=3, scaling="channel", **GROUPS),
    "depthwise": FrozenConv2d(8, 16, 5, 2, 2, groups=8, scaling="none"),
    "bias": FrozenConv2d(8, 12, 3, padding=1, bias=True, scaling="channel"),
    "bias, no scale": FrozenConv2d(8, 12, 3, padding=1, bias=True, scaling="none"),
    "planes": PlaneConv(8, 16, lambda *shape, planes: FrozenConv2d(*shape, groups=2, bias=True), 2, 2),
    "MCN": FrozenModulatedConv2d(8, 24, 3, padding=1, planes=3, **GROUPS),
    "MCN, three levels": FrozenModulatedConv2d(8, 24, 3, padding=1, planes=3, levels=3, **GROUPS),
    "MCN, four levels": FrozenModulatedConv2d(8, 16, 1, levels=4, **GROUPS),
    "U-MCN": FrozenModulatedConv2d(8, 24, 3, padding=1, planes=3, levels=None, **GROUPS),
    "MCN-1": FrozenModulatedConv2d(8, 32, 3, padding="same", planes=2, average=True, groups=8, bias=True),
}


def in_openvino(network, images):
    pytest.importorskip("openvino")
    return compile_openvino(network).logits(images)


def in_c(network, images):
    needs("cc")
    write_program(network, images)
    build("cc", "-O1")
    return run_program("./run")[1]


every_runtime = pytest.mark.parametrize("logits_in", [in_openvino, in_c])


def assert_close(network, images, logits):
    expected = logits_of(network, images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signs", [False, True])
@every_runtime
def test_layers_in_other_runtimes(name, signs, logits_in):
    front = [FrozenBatchNorm2d(8), SignActivation()] if signs else []
    channels, *size = LAYERS[name](torch.zeros(1, 8, 9, 9))[0].shape
    behind = FrozenBatchNorm2d(channels), nn.PReLU(), nn.Flatten(), nn.Linear(channels * math.prod(size), 5)
    network, images = layers_of(*front, LAYERS[name], *behind, shape=(8, 9, 9)), raw_images(3, (8, 9, 9))
    assert_close(network, images, logits_in(network, images))


@every_runtime
def test_signs_of_biased_sums(logits_in):
    """Halves of whole numbers plus a bias, at the thresholds of the batch norm behind them, are exact."""
    first = FrozenConv2d(8, 16, 3, padding=1, groups=2, bias=True)
    last = FrozenConv2d(16, 6, 1, groups=2, scaling="none", bias=True)
    behind = FrozenBatchNorm2d(16), SignActivation(), last, nn.Flatten(), nn.Linear(6 * 36, 3)
    network, images = layers_of(SignActivation(), first, *behind, shape=(8, 6, 6)), raw_images(4, (8, 6, 6))
    features = network.features
    features.b.scale.fill_(0.5)
    features.b.bias.copy_(torch.arange(16) % 5 - 2)
    features.c.scale.copy_(torch.tensor([1.0, -1.0, 2.0, -2.0] * 4))
    features.c.shift.copy_(-features.c.scale * (torch.arange(16) % 9 - 2))
    assert smallest_signed(network, images).max() == 0
    assert_close(network, images, logits_in(network, images))


def test_ungrouped_layers_with_a_bias_still_count_bits():
    network = layers_of(SignActivation(), LAYERS["bias"], nn.Flatten(), nn.Linear(12 * 36, 3), shape=(8, 6, 6))
    assert "convolve_signs" in to_c(network, "network").code
    grouped = layers_of(SignActivation(), LAYERS["real"], nn.Flatten(), nn.Linear(12 * 36, 3), shape=(8, 6, 6))
    assert "convolve_signs" not in to_c(grouped, "network").code


# --- whole networks -------------------------------------------------------------------------------------------------


def separable(num_classes, in_channels, convolution, activation, *, widths=(8, 16), planes=1):
    """Depthwise 3×3 and pointwise 1×1 convolutions."""
    first, second = (width * planes for width in widths)
    layers = OrderedDict(stem=full_precision_stem(in_channels, first))
    layers["sign"] = activation()
    layers["depthwise"] = convolution(first, first, 3, 1, 1, planes=1, groups=first, bias=True)
    layers["norm"], layers["sign2"] = nn.BatchNorm2d(first), activation()
    layers["pointwise"] = convolution(first, second, 1, bias=True)
    layers["norm2"], layers["relu"] = nn.BatchNorm2d(second), nn.ReLU()
    return pooled(layers, second, num_classes)


class Grouped(OneBitClassifier):
    """A family whose layers all have groups and a bias."""

    family = "BNN"

    def __init__(self, **others):
        super().__init__(**others)
        self.build_network(partial(BinaryConv2d, groups=2, bias=True), SignActivation)


SEPARABLE: dict[str, Any] = {"backbone": "separable", "widths": [8, 12], "in_channels": 3, "num_classes": 5}
MODELS = {
    "BNN": lambda: BNN(**SEPARABLE),
    "PCNN": lambda: PCNN(**SEPARABLE, projections=4),
    "PCNN, ternary": lambda: PCNN(**SEPARABLE, projections=2, stage="ternary"),
    "PCNN, full precision": lambda: PCNN(**SEPARABLE, projections=2, full_precision=True),
    "MCN": lambda: MCN(**SEPARABLE, planes=2),
    "MCN, three levels": lambda: MCN(**SEPARABLE, planes=2, levels=3),
    "grouped": lambda: Grouped(backbone="wrn7", widths=[4, 4, 6, 8], in_channels=3, num_classes=5),
}
DATA = SimpleNamespace(image_shape=(3, 9, 8), mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture
def model(request, monkeypatch):
    """A model with random biases and batch norms."""
    monkeypatch.setitem(BACKBONES, "separable", separable)
    torch.manual_seed(0)
    model = randomise(MODELS[request.param]())
    for layer in model.net.modules():
        if getattr(layer, "bias", None) is not None:
            layer.bias.data.normal_()
    return model


every_model = pytest.mark.parametrize("model", MODELS, indirect=True)


@every_model
def test_packed_files(model):
    description = describe(model, DATA)
    save_packed(model.net, "network.safetensors", description)
    loaded, frozen = load_packed("network.safetensors"), freeze(model.net)
    assert list(loaded.state_dict()) == list(frozen.state_dict())
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in frozen.state_dict().items())
    assert str(loaded.features) == str(frozen.features)
    images = torch.randn(3, 3, 9, 8)
    assert torch.equal(loaded(images), model.net(images))
    header, _, _ = parts_of(Path("network.safetensors"))
    assert header["format_version"] == 2


@pytest.mark.parametrize(
    ("model", "shared"),
    [("BNN", {"bias": True}), ("grouped", {"bias": True, "groups": 2})],
    indirect=["model"],
)
def test_the_description_has_what_all_layers_share(model, shared):
    assert describe(model, DATA).layer == {"scaling": "channel", **shared}


@pytest.mark.parametrize("model", ["grouped"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"groups": 4}, "there is no such network: groups must divide in_channels=4 and out_channels=6, but got 4"),
        ({"groups": 0}, "there is no such network: groups must be an integer of at least 1, but got 0"),
        ({"bias": 1}, "there is no such network: bias must be true or false, but got 1"),
        ({"groups": 1}, "the network is not the one of its description"),
        ({"bias": False}, "the network is not the one of its description"),
    ],
    ids=str,
)
def test_descriptions_of_other_groups_are_refused(model, changes, why):
    description = describe(model, DATA)
    wrong = dataclasses.replace(description, layer=description.layer | changes)
    with pytest.raises(InputError, match=re.escape(why)):
        save_packed(model.net, "network.safetensors", wrong)


@every_model
@every_runtime
def test_networks_in_other_runtimes(model, logits_in):
    network, images = PackedNetwork.of(model.net, describe(model, DATA)), raw_images(20, (3, 9, 8))
    logits = logits_in(network, images)
    assert_agree(network, images, logits.argmax(1), logits)


@every_model
def test_exported_programs(model):
    onnxruntime = pytest.importorskip("onnxruntime")
    network, images = PackedNetwork.of(model.net, describe(model, DATA)), raw_images(20, (3, 9, 8))
    save_torch(model.net, "network.pt2", network.description)
    torch.testing.assert_close(
        torch.export.load("network.pt2").module()(images), logits_of(network, images), rtol=0, atol=0
    )
    save_onnx(model.net, "network.onnx", network.description)
    session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])
    (logits,) = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
    assert_agree(network, images, logits.argmax(1), logits)
