"""OpenVINO computes each layer as the frozen network does."""

import re

import pytest
import torch
from agreement import logits_of, smallest_signed
from openvino_networks import agree, binary_convolutions, layers_of, raw_images
from torch import nn

from pcnn_lightning.backbones.mcn import PlaneConv, RepeatChannels, WholeMaxPool
from pcnn_lightning.deploy import compile_openvino
from pcnn_lightning.deploy.openvino import to_openvino
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import FrozenBatchNorm2d, FrozenConv2d, SignActivation
from pcnn_lightning.layers.modulated import FrozenModulatedConv2d

pytest.importorskip("openvino")


def name_of(layers):
    return re.sub(r"\s+", "", ",".join(map(repr, layers)))


def binary_layers(in_channels, out_channels, size=(6, 7), **arguments):
    """Batch norm, sign, and convolution, after which sums are whole numbers."""
    arguments = {"kernel_size": 3, "padding": 1, "scaling": "none", **arguments}
    layers = FrozenBatchNorm2d(in_channels), SignActivation(), FrozenConv2d(in_channels, out_channels, **arguments)
    return layers_of(*layers, shape=(in_channels, *size))


@pytest.mark.parametrize("in_channels", [1, 8, 12, 20, 24, 33, 136])
@pytest.mark.parametrize("out_channels", [1, 12, 20, 33])
def test_sums_of_any_number_of_channels_are_exact(in_channels, out_channels):
    network = binary_layers(in_channels, out_channels)
    assert binary_convolutions(to_openvino(network)) == (in_channels % 8 == 0)
    images = raw_images(3, (in_channels, 6, 7))
    assert torch.equal(compile_openvino(network).logits(images), logits_of(network, images))


@pytest.mark.parametrize(
    ("arguments", "binary"),
    [
        ({"stride": 2}, True),
        ({"stride": (2, 1), "padding": (0, 1)}, True),
        ({"padding": 0}, True),
        ({"padding": "same"}, True),
        ({"padding": "valid", "stride": 2}, True),
        ({"kernel_size": 1, "padding": 0, "stride": 2}, True),
        ({"kernel_size": 2, "padding": "same"}, True),
        ({"kernel_size": (1, 3)}, True),
        ({"padding": 2}, False),
        ({"stride": 3}, False),
        ({"dilation": 2}, False),
        ({"dilation": 2, "padding": "same", "kernel_size": 2}, False),
        ({"kernel_size": 5, "stride": 3, "padding": 2}, False),
        ({"levels": 3}, False),
        ({"levels": 3, "stride": 2}, False),
        ({"bias": True}, True),
        ({"groups": 2}, False),
        ({"groups": 8, "levels": 3}, False),
        ({"groups": 4, "padding": "same", "dilation": 2, "bias": True}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(9, 8), (5, 19)])
def test_sums_of_any_convolution_are_exact(arguments, binary, size):
    network = binary_layers(16, 24, size, **arguments)
    assert binary_convolutions(to_openvino(network)) == binary
    images = raw_images(2, (16, *size))
    assert torch.equal(compile_openvino(network).logits(images), logits_of(network, images))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (17, 33)])
def test_images_of_any_size(size):
    network = binary_layers(8, 8, size)
    images = raw_images(2, (8, *size))
    assert torch.equal(compile_openvino(network).logits(images), logits_of(network, images))


@pytest.mark.parametrize("in_channels", [8, 12])
def test_a_value_at_its_threshold_is_positive(in_channels):
    """Integers times ±1 and ±2 plus integers are exact, and often 0."""
    network = binary_layers(in_channels, 5)
    network.mean.fill_(100)
    network.std.fill_(1)
    norm = network.features.a
    norm.scale.copy_(torch.tensor([1.0, -1.0, 2.0, -2.0] * (in_channels // 4)))
    norm.shift.copy_(-norm.scale * torch.arange(-3, in_channels - 3))
    images = raw_images(7, (in_channels, 6, 7)) % 8 + 96
    pixels = network.preprocess(images)
    assert 0.05 < (norm(pixels) == 0).float().mean() < 0.3
    assert torch.equal(compile_openvino(network).logits(images), logits_of(network, images))


@pytest.mark.parametrize("in_channels", [8, 12])
def test_zero_is_positive(in_channels):
    """The threshold is 0, below which there are only numbers so small that a processor may take them for 0."""
    network = binary_layers(in_channels, 5)
    network.mean.fill_(2)
    network.std.fill_(1)
    network.features.a.scale.copy_(torch.tensor([1.0, -1.0] * (in_channels // 2)))
    network.features.a.shift.zero_()
    images = raw_images(7, (in_channels, 6, 7)) % 5
    for threads in (1, 2):
        assert torch.equal(compile_openvino(network, threads).logits(images), logits_of(network, images))


@pytest.mark.parametrize("scaling", ["none", "layer"])
@pytest.mark.parametrize("channels", [8, 12, 40])
@pytest.mark.parametrize("between", [(), (nn.PReLU(),), (nn.MaxPool2d(2),), (nn.Identity(), nn.ReLU())], ids=name_of)
def test_sums_at_the_thresholds_of_the_next_layer(scaling, channels, between):
    """OpenVINO computes the next signs together with the sums, which are whole numbers, or halves with a scale."""
    first, last = FrozenConv2d(8, channels, 3, padding=1, scaling=scaling), FrozenConv2d(channels, 5, 3, scaling="none")
    layers = SignActivation(), first, *between, FrozenBatchNorm2d(channels), SignActivation(), last
    network = layers_of(*layers, shape=(8, 6, 7))
    norm = next(module for module in network.modules() if isinstance(module, FrozenBatchNorm2d))
    norm.scale.copy_(torch.tensor([1.0, -1.0, 2.0, -2.0] * (channels // 4)))
    norm.shift.copy_(-norm.scale * (torch.arange(channels) % 9 - 2))
    for module in network.modules():
        if isinstance(module, FrozenConv2d) and module.scale is not None:
            module.scale.fill_(0.5)
        elif isinstance(module, nn.PReLU):
            module.weight.data.fill_(0.5)
    images = raw_images(5, (8, 6, 7))
    assert smallest_signed(network, images).max() == 0
    assert torch.equal(compile_openvino(network).logits(images), logits_of(network, images))


@pytest.mark.parametrize("scaling", ["layer", "channel", "none"])
@pytest.mark.parametrize("levels", [2, 3])
def test_scaled_sums_are_rounded_once(scaling, levels):
    network = binary_layers(16, 12, scaling=scaling, levels=levels)
    images = raw_images(2, (16, 6, 7))
    assert torch.equal(compile_openvino(network).logits(images), logits_of(network, images))


def test_signs_without_a_batch_norm_and_of_a_maximum():
    layers = SignActivation(), nn.MaxPool2d(2, ceil_mode=True), FrozenConv2d(8, 4, 3, padding=1), nn.PReLU(4)
    network = layers_of(*layers, shape=(8, 7, 9))
    assert binary_convolutions(to_openvino(network)) == 1
    images = raw_images(2, (8, 7, 9))
    assert torch.equal(compile_openvino(network).logits(images), logits_of(network, images))


def test_real_activations_are_convolved_as_floats():
    network = layers_of(FrozenConv2d(8, 5, 3, padding=1), shape=(8, 7, 9))
    assert binary_convolutions(to_openvino(network)) == 0
    assert agree(network, raw_images(2, (8, 7, 9))) == 0


def plain(in_channels, out_channels, size, planes):
    return nn.Conv2d(in_channels, out_channels, size, bias=False)


OTHERS = [
    (nn.Conv2d(8, 12, 3, 2, 1, bias=False),),
    (nn.Conv2d(8, 12, (3, 2), padding="same", groups=4),),
    (nn.Conv2d(8, 6, 2, padding="valid", dilation=2),),
    (nn.PReLU(),),
    (nn.PReLU(8), nn.ReLU(), nn.Identity()),
    (FrozenBatchNorm2d(8), nn.ReLU()),
    (nn.MaxPool2d(2, ceil_mode=True),),
    (nn.MaxPool2d(3, 2, 1),),
    (nn.MaxPool2d(2, 3, ceil_mode=True),),
    (nn.MaxPool2d((3, 2), (1, 2), (1, 0), 2),),
    (nn.AvgPool2d(2),),
    (nn.AvgPool2d(2, ceil_mode=True),),
    (nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),),
    (nn.AvgPool2d(3, 2, 1),),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True),),
    (nn.AvgPool2d((1, 4), (2, 3), ceil_mode=True),),
    (nn.Conv2d(8, 12, 1, bias=False, groups=2), FrozenBatchNorm2d(12), nn.AvgPool2d(2, ceil_mode=True)),
    (nn.Conv2d(8, 12, 1, bias=False), FrozenBatchNorm2d(12), nn.AvgPool2d(3, 2, 1)),
    (nn.Conv2d(8, 12, 1), FrozenBatchNorm2d(12), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    (nn.Conv2d(8, 12, 1, 2, bias=False), FrozenBatchNorm2d(12), nn.AvgPool2d(2)),
    (
        PlaneConv(8, 12, plain, 2, 4),
        FrozenBatchNorm2d(12),
        nn.AvgPool2d(2),
    ),
    (nn.AdaptiveAvgPool2d(1),),
    (nn.AdaptiveAvgPool2d(4),),
    (nn.AdaptiveAvgPool2d((None, 3)),),
    (nn.AdaptiveAvgPool2d((7, 10)),),
    (WholeMaxPool(), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)),
    (nn.Flatten(), nn.PReLU(560)),
    (RepeatChannels(3),),
    (PlaneConv(8, 12, plain, 2, 4),),
    (PlaneConv(8, 12, lambda *shape, planes: FrozenConv2d(*shape), 2, 4),),
    (PlaneConv(8, 12, lambda *shape, planes: FrozenConv2d(*shape, levels=3), 1, 2),),
    (SignActivation(), PlaneConv(8, 12, lambda *shape, planes: FrozenConv2d(*shape, scaling="channel"), 2, 4)),
    (PlaneConv(8, 12, lambda *shape, planes: FrozenModulatedConv2d(*shape, planes=1), 1, 4),),
    *((FrozenModulatedConv2d(8, 12, 3, 1, 1, planes=4, levels=levels),) for levels in (2, 3, 4, None)),
    (FrozenModulatedConv2d(8, 12, 3, 2, planes=2, average=True),),
    (FrozenConv2d(8, 16, (3, 2), padding="same", groups=8, bias=True, scaling="channel"),),
    (FrozenModulatedConv2d(8, 12, (2, 3), dilation=2, groups=2, bias=True, planes=3),),
]


@pytest.mark.parametrize("layers", OTHERS, ids=name_of)
def test_other_layers(layers):
    network = layers_of(*layers, shape=(8, 7, 10))
    images = raw_images(3, (8, 7, 10))
    found, expected = compile_openvino(network).logits(images), logits_of(network, images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


class Own(FrozenConv2d):
    pass


@pytest.mark.parametrize(
    ("layers", "what"),
    [
        ((nn.ReLU(), nn.GELU()), "features.b .* no translation of GELU"),
        ((Own(8, 8, 3),), "features.a .* no translation of Own"),
        ((PlaneConv(8, 8, lambda *shape, planes: Own(*shape), 1, 2),), "features.a .* no translation of Own"),
        ((nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),), "features.a .* padding_mode 'reflect'"),
        ((nn.AvgPool2d(2, divisor_override=3),), "features.a .* divisor_override"),
        ((nn.AvgPool2d(3, 2, 1, ceil_mode=True),), "features.a .* ceil_mode with count_include_pad"),
        ((nn.Flatten(2), nn.Flatten()), "features.a .* start_dim 2"),
    ],
)
def test_other_layers_are_refused_by_name(layers, what):
    with pytest.raises(InputError, match=what):
        to_openvino(layers_of(*layers, shape=(8, 7, 10)))
