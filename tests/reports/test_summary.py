"""The counts of a summary, against arithmetic by hand and other counters."""

from itertools import pairwise

import pytest
import torch
from summary_helpers import CIFAR, COUNTS, DIGITS, build, counts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.layers import BinaryConv2d, ModulatedConv2d, ProjectionConv2d, QuantizedConv2d, SignActivation
from pcnn_lightning.reports.summary import summarize


def stage(before, after, blocks):
    """Weights of the 3×3 convolutions of a stage."""
    return 9 * (before * after + (blocks - 1) * after**2)


# --- totals by hand -------------------------------------------------------------------------------------------------


def test_resnet18_has_the_published_bits():
    summary = summarize(build("resnet18", num_classes=1000), (3, 224, 224))
    total = summary.total
    binary = stage(64, 64, 4) + stage(64, 128, 4) + stage(128, 256, 4) + stage(256, 512, 4)
    shortcuts = 64 * 128 + 128 * 256 + 256 * 512
    norms = 64 + (4 * 64) + (64 + 3 * 128) + (128 + 3 * 256) + (256 + 3 * 512) + (128 + 256 + 512)
    slopes = 64 + 4 * (64 + 128 + 256 + 512)
    others = 49 * 3 * 64 + shortcuts + 512 * 1000 + 1000 + 2 * norms + slopes
    assert counts(total)[:3] == (binary, 0, others + 16) == (10_985_472, 0, 707_064)
    assert (total.bits, summary.twin_bits) == (binary + 32 * (others + 16), 32 * (binary + others))
    assert (round(total.bits / 1e6, 1), round(summary.twin_bits / 1e6, 1)) == (33.6, 374.2)
    assert round(summary.compression, 1) == 11.1
    # Projections and the running statistics of batch norms exist in training only.
    assert total.values_training == binary + 16 * 9 + others + 2 * norms

    areas = {64: 56**2, 128: 28**2, 256: 14**2, 512: 7**2}
    assert total.macs_1bit == sum(
        stage(before, after, 4) * areas[after] for before, after in [(64, 64), (64, 128), (128, 256), (256, 512)]
    )
    # The shortcuts' convolutions come before their pools.
    full = 49 * 3 * 64 * 112**2 + sum(2 * width**2 * areas[width] for width in (64, 128, 256)) + 512_000
    assert total.macs_32bit == full == 195_596_288
    assert total.operations == full + 1_676_279_808 / 64


@pytest.mark.parametrize(("kind", "bits"), [("binary", 1), ("ternary", 2)])
@pytest.mark.parametrize("planes", [1, 4])
def test_wrn22(planes, kind, bits):
    total = summarize(build("wrn22", planes=planes, stage=kind), CIFAR).total
    first, second, third = 16 * planes, 32 * planes, 64 * planes
    stages = [stage(first, first, 6), stage(first, second, 6), stage(second, third, 6)]
    shortcuts = [first * second // planes, second * third // planes]
    norms = first + 6 * first + (first + 5 * second) + (second + 5 * third) + second + third
    slopes = first + 6 * (first + second + third)
    others = 27 * first + sum(shortcuts) + 10 * third + 10 + slopes
    quantized = (sum(stages), 0) if bits == 1 else (0, sum(stages))
    assert counts(total)[:3] == (*quantized, others + 2 * norms + 18)
    assert total.bits == bits * sum(stages) + 32 * (others + 2 * norms + 18)
    assert total.values_training == sum(stages) // planes + 18 * planes * 9 + others + 4 * norms
    # Ternary kernels convolve at one bit too.
    assert total.macs_1bit == stages[0] * 32**2 + stages[1] * 16**2 + stages[2] * 8**2
    assert total.macs_32bit == 27 * first * 32**2 + shortcuts[0] * 32**2 + shortcuts[1] * 16**2 + 10 * third


def test_wrn7_on_digits():
    total = summarize(build("wrn7", in_channels=1), DIGITS).total
    binary, norms, slopes = [9 * 16 * 16, 9 * 16 * 32, 9 * 32 * 64], 16 + 16 + 16 + 32 + 32 + 64, 16 + 16 + 32 + 64
    others = 9 * 16 + 16 * 32 + 32 * 64 + 650 + 2 * norms + slopes + 3
    assert counts(total)[:3] == (sum(binary), 0, others) == (25_344, 0, 3_837)
    assert total.macs_1bit == binary[0] * 256 + binary[1] * 64 + binary[2] * 16
    assert total.macs_32bit == 9 * 16 * 256 + 16 * 32 * 256 + 32 * 64 * 64 + 640


def test_vgg_small():
    total = summarize(build("vgg_small"), CIFAR).total
    first, second, third = 9 * 128**2, 9 * (128 * 256 + 256**2), 9 * (256 * 512 + 512**2)
    norms, slopes = 128 + 128 + 128 + 256 + 256 + 512, 128 + 128 + 256 + 256 + 512 + 512
    others = 27 * 128 + 512 * 16 * 10 + 10 + 2 * norms + slopes
    assert counts(total)[:3] == (first + second + third, 0, others + 5)
    assert total.macs_1bit == first * 32**2 + second * 16**2 + third * 8**2
    assert total.macs_32bit == 27 * 128 * 32**2 + 512 * 16 * 10


@pytest.mark.parametrize(
    ("arguments", "bits", "of_3x3", "of_1x1"),
    [
        ({}, 1, 4 * 9 + 1, 1 + 1),
        ({"scale": 0.1}, 1, 4 * 9 + 1, 1 + 1),
        ({"average": True}, 1, 4 + 1, 1 + 1),
        ({"levels": 3}, 2, 4 * 9 + 3, 1 + 3),
        ({"levels": 4, "average": True}, 2, 4 + 4, 1 + 4),
        ({"binarize": False}, 32, 4 * 9, 1),
        ({"binarize": False, "average": True}, 32, 4, 1),
    ],
    ids=["MCN", "fixed scale", "MCN-1", "U=3", "U=4, MCN-1", "U-MCN", "U-MCN-1"],
)
def test_mcn20(arguments, bits, of_3x3, of_1x1):
    summary = summarize(build("mcn20", family="modulated", planes=4, **arguments), CIFAR)
    total = summary.total
    # C of a 3×3 layer has a quarter of Q's elements, that of a shortcut all of them.
    stages = [9 * 12 * 64 + 6 * 9 * 64**2, stage(64, 128, 6), stage(128, 256, 6)]
    shortcuts = [16 * 32, 32 * 64]
    elements = sum(stages) // 4 + sum(shortcuts)
    norms = 6 * 64 + (64 + 5 * 128) + (128 + 5 * 256) + 256
    others = 256 * 10 + 10 + 2 * norms
    few = {1: (elements, 0, 0), 2: (0, elements, 0), 32: (0, 0, elements)}[bits]
    assert counts(total)[:3] == (*few[:2], few[2] + 19 * of_3x3 + 2 * of_1x1 + others)
    assert summary.twin_bits == 32 * (sum(stages) + sum(shortcuts) + others)
    centers = 21 * arguments.get("levels", 0)
    assert total.values_training == elements + 19 * 36 + 2 + centers + others + 2 * norms
    # A shortcut convolves each of the four planes.
    planes = 4 * (shortcuts[0] * 16**2 + shortcuts[1] * 8**2)
    assert total.macs_1bit == 0
    assert total.macs_32bit == stages[0] * 32**2 + stages[1] * 16**2 + stages[2] * 8**2 + planes + 2560


def test_mcn_small_on_images_of_odd_size():
    total = summarize(build("mcn_small", family="modulated", planes=4, in_channels=1), (1, 17, 13)).total
    widths = [4, 80, 160, 320, 640]
    kernels = [9 * before * after for before, after in pairwise(widths)]
    others = 640 * 1024 + 1024 + 1024 * 10 + 10 + 2 * sum(widths[1:])
    assert counts(total)[:3] == (sum(kernels) // 4, 0, 4 * 37 + others)
    areas = [17 * 13, 9 * 7, 5 * 4, 3 * 2]  # pools round up
    pairs = zip(kernels, areas, strict=True)
    assert total.macs_32bit == sum(kernel * area for kernel, area in pairs) + 640 * 1024 + 1024 * 10


# --- totals against other counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_the_twin_is_the_network_with_ordinary_convolutions(name):
    stages = {"vgg": [4, 6, 8], "res": [4, 4, 6, 8, 8]}.get(name[:3], [4, 4, 6, 8])
    arguments = {"planes": 2, "widths": stages}
    twin = build(name, family="full", **arguments)
    expected = summarize(twin, (3, 33, 31))
    assert expected.compression == 1
    assert counts(expected.total)[:2] == (0, 0)
    assert expected.total.operations == expected.total.macs_32bit
    with FlopCounterMode(display=False) as counter:
        twin.eval()(torch.zeros(1, 3, 33, 31))
    assert expected.total.macs_32bit == counter.get_total_flops() / 2
    for family in ("projection", "modulated"):
        network = build(name, family=family, **arguments)
        summary = summarize(network, (3, 33, 31))
        assert summary.twin_bits == expected.total.bits
        assert summary.total.macs_1bit + summary.total.macs_32bit == expected.total.macs_32bit
        assert summary.compression > 1
        held = [value.numel() for value in network.state_dict().values() if value.is_floating_point()]
        assert summary.total.values_training == sum(held)


@pytest.mark.parametrize("name", ["wrn22", "mcn20"])
def test_rows_add_up_and_name_each_layer(name):
    network = build(name, planes=2, widths=[2, 2, 3, 4])
    summary = summarize(network, CIFAR)
    for count in (*COUNTS, "values_training", "parameters_twin", "bits", "operations"):
        assert getattr(summary.total, count) == sum(getattr(row, count) for row in summary.layers)
    layers = {
        name: type(module).__name__
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, QuantizedConv2d))
    }
    assert {row.layer: row.kind for row in summary.layers[: len(layers)]} == layers
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert summary.layers[len(layers)].layer == f"{norms} × BatchNorm2d"


# --- one layer ------------------------------------------------------------------------------------------------------


def only(layer, shape):
    (row,) = summarize(layer, shape).layers
    return row


@pytest.mark.parametrize(
    ("arguments", "height", "width"),
    [
        ({"padding": 1}, 9, 6),
        ({"padding": 1, "stride": 2}, 5, 3),
        ({"stride": 2}, 4, 2),
        ({"stride": (1, 3), "padding": (0, 1), "dilation": 2}, 5, 2),
        ({"padding": "same"}, 9, 6),
    ],
    ids=str,
)
def test_a_convolution_multiplies_for_each_element_of_its_output(arguments, height, width):
    for layer, kernel in [
        (ProjectionConv2d(4, 6, 3, projections=2, **arguments), 4 * 9),
        (ModulatedConv2d(4, 6, 3, planes=3, **arguments), 4 * 9),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False, **arguments), 2 * 9),
    ]:
        row = only(layer, (4, 9, 6))
        assert row.output_shape == (6, height, width)
        assert counts(row)[3:] == (0, kernel * 6 * height * width)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_groups_divide_weights_and_multiplications_and_a_bias_adds_numbers(groups):
    weights = 16 * (8 // groups) * 9
    given = {"padding": 1, "groups": groups, "bias": True}
    layers = {  # with parameters at 1 bit and at 32 bits, and those of training
        BinaryConv2d(8, 16, 3, **given): (weights, 16 + 16, weights + 16),
        ProjectionConv2d(8, 16, 3, projections=2, **given): (weights, 1 + 16, weights // 2 + 2 * 9 + 16),
        ModulatedConv2d(8, 16, 3, planes=2, **given): (weights // 2, 1 + 2 * 9 + 16, weights // 2 + 2 * 9 + 16),
    }
    for layer, (bits, numbers, training) in layers.items():
        (row,) = summarize(nn.Sequential(SignActivation(), layer), (8, 5, 4)).layers
        macs = (weights * 20, 0) if layer.convolves_signs else (0, weights * 20)
        assert counts(row) == (bits, 0, numbers, *macs)
        assert (row.parameters_twin, row.values_training) == (weights + 16, training)
    twin = only(nn.Conv2d(8, 16, 3, **given), (8, 5, 4))
    assert (twin.parameters_twin, twin.macs_32bit) == (weights + 16, weights * 20)


def test_reused_and_unused_layers():
    layer = ProjectionConv2d(4, 4, 3, padding=1)
    row = only(nn.Sequential(SignActivation(), layer, SignActivation(), layer), (4, 5, 5))
    assert counts(row) == (144, 0, 1, 2 * 144 * 25, 0)
    # Each pass is counted by its own input.
    assert counts(only(nn.Sequential(layer, SignActivation(), layer), (4, 5, 5)))[3:] == (3600, 3600)

    network = nn.Sequential(nn.Conv2d(1, 2, 1))
    network[0].unused = nn.Linear(3, 4)
    rows = summarize(network, (1, 2, 2)).layers
    assert [(row.layer, *counts(row)[2:]) for row in rows] == [("0", 4, 0, 8), ("0.unused", 16, 0, 0)]


def test_batch_norms_fold_into_two_numbers_a_channel():
    rows = summarize(nn.Sequential(nn.BatchNorm2d(5), nn.BatchNorm2d(5, affine=False), nn.PReLU(5)), (5, 2, 2)).layers
    assert [(row.layer, row.parameters_32bit, row.values_training) for row in rows] == [
        ("2 × BatchNorm2d", 20, 30),
        ("1 × PReLU", 5, 5),
    ]
