"""The summary: published sizes, totals against arithmetic by hand, what multiplies at one bit, what is printed."""

import copy
import csv
import io
import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pcnn_lightning.backbones import BACKBONES, build_backbone
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, QuantizedConv2d, SignActivation
from pcnn_lightning.summary import summarize

CIFAR, DIGITS = (3, 32, 32), (1, 16, 16)
COUNTS = ("parameters_1bit", "parameters_2bit", "parameters_32bit", "macs_1bit", "macs_32bit")


def build(name, *, family="projection", planes=1, num_classes=10, in_channels=3, stages=None, **arguments):
    def convolution(*shape, planes=planes):
        if family == "projection":
            return ProjectionConv2d(*shape, projections=planes, **arguments)
        if family == "modulated":
            return ModulatedConv2d(*shape, planes=planes, **arguments)
        return nn.Conv2d(*shape, bias=False)

    activation = SignActivation if family == "projection" else nn.Identity
    return build_backbone(name, num_classes, in_channels, convolution, activation, planes=planes, stages=stages)


def counts(row):
    return tuple(getattr(row, name) for name in COUNTS)


def stage(before, after, blocks):
    """Weights of the 3×3 convolutions of a stage."""
    return 9 * (before * after + (blocks - 1) * after**2)


# --- totals, by hand --------------------------------------------------------------------------------------------


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
    # A projection and both running statistics of each norm are there in training only.
    assert total.values_training == binary + 16 * 9 + others + 2 * norms

    areas = {64: 56**2, 128: 28**2, 256: 14**2, 512: 7**2}
    assert total.macs_1bit == sum(
        stage(before, after, 4) * areas[after] for before, after in [(64, 64), (64, 128), (128, 256), (256, 512)]
    )
    # The shortcuts' convolutions come before their pools.
    full = 49 * 3 * 64 * 112**2 + sum(2 * width**2 * areas[width] for width in (64, 128, 256)) + 512_000
    assert total.macs_32bit == full == 195_596_288
    assert total.operations == full + 1_676_279_808 / 64


@pytest.mark.parametrize(("levels", "bits"), [("binary", 1), ("ternary", 2)])
@pytest.mark.parametrize("planes", [1, 4])
def test_wrn22(planes, levels, bits):
    total = summarize(build("wrn22", planes=planes, levels=levels), CIFAR).total
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


# --- totals, against other counts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_the_twin_is_the_network_with_ordinary_convolutions(name):
    stages = {"vgg": [4, 6, 8], "res": [4, 4, 6, 8, 8]}.get(name[:3], [4, 4, 6, 8])
    arguments = {"planes": 2, "stages": stages}
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
    network = build(name, planes=2, stages=[2, 2, 3, 4])
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


# --- one layer --------------------------------------------------------------------------------------------------


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


def test_a_layer_passed_twice_is_stored_once_and_one_never_passed_is_stored():
    layer = ProjectionConv2d(4, 4, 3, padding=1)
    row = only(nn.Sequential(SignActivation(), layer, SignActivation(), layer), (4, 5, 5))
    assert counts(row) == (144, 0, 1, 2 * 144 * 25, 0)
    # What one pass sees says nothing of the other.
    assert counts(only(nn.Sequential(layer, SignActivation(), layer), (4, 5, 5)))[3:] == (3600, 3600)

    network = nn.Sequential(nn.Conv2d(1, 2, 1))
    network[0].unused = nn.Linear(3, 4)
    rows = summarize(network, (1, 2, 2)).layers
    assert [(row.layer, *counts(row)[2:]) for row in rows] == [("0", 4, 0, 8), ("0.unused", 16, 0, 0)]


def test_norms_fold_into_two_numbers_a_channel_with_or_without_parameters_of_their_own():
    rows = summarize(nn.Sequential(nn.BatchNorm2d(5), nn.BatchNorm2d(5, affine=False), nn.PReLU(5)), (5, 2, 2)).layers
    assert [(row.layer, row.parameters_32bit, row.values_training) for row in rows] == [
        ("2 × BatchNorm2d", 20, 30),
        ("1 × PReLU", 5, 5),
    ]


# --- one bit ----------------------------------------------------------------------------------------------------


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


MOVES = {
    "nothing": lambda x: x,
    "a slice": lambda x: x[..., ::2, ::2],
    "planes below one another": lambda x: x[..., ::2, ::2].reshape(len(x), 4, -1, x.shape[-1] // 2),
    "a copy": lambda x: x.clone().contiguous(memory_format=torch.channels_last),
    "repeated channels": lambda x: x.repeat_interleave(2, dim=1)[:, 2:6],
    "a max-pool that rounds up": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "a max-pool that pads": lambda x: F.max_pool2d(x, 3, 2, 1),
}
CHANGES = {
    "relu": F.relu,
    "an average": lambda x: F.avg_pool2d(x, 2),
    "the mean": lambda x: x.mean(dim=(2, 3), keepdim=True),
    "a scale": lambda x: 0.5 * x,
    "a sum": lambda x: x + x,
    "a shortcut": lambda x: x + torch.nan,
    "zeros around": lambda x: F.pad(x, (1, 1)),
}


@pytest.mark.parametrize("shape", [(4, 8, 6), (4, 7, 9)], ids=str)
@pytest.mark.parametrize(("way", "binary"), [*((way, True) for way in MOVES), *((way, False) for way in CHANGES)])
def test_signs_are_followed_from_where_they_are_made_to_where_they_convolve(way, binary, shape):
    middle = Function({**MOVES, **CHANGES}[way])
    layer = ProjectionConv2d(4, 4, 1)
    one_bit = [row.macs_1bit > 0 for row in summarize(nn.Sequential(SignActivation(), middle, layer), shape).layers]
    assert one_bit == [binary]


@pytest.mark.parametrize(
    "between",
    [[nn.Dropout(0.5)], [nn.MaxPool2d(2)], [nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.1)]],
    ids=["dropout", "pool", "several"],
)
def test_dropout_and_pools_keep_signs(between):
    network = nn.Sequential(nn.BatchNorm2d(4), SignActivation(), *between, ProjectionConv2d(4, 8, 3, padding=1))
    assert summarize(network.train(), (4, 6, 6)).total.macs_32bit == 0


@pytest.mark.parametrize(
    "between",
    [[nn.BatchNorm2d(4)], [nn.PReLU(4)], [nn.Conv2d(4, 4, 1)], [ProjectionConv2d(4, 4, 1)], [nn.PReLU(4), nn.ReLU()]],
    ids=["norm", "prelu", "conv", "projection", "relu"],
)
def test_what_is_computed_from_signs_is_real(between):
    network = nn.Sequential(SignActivation(), *between, ProjectionConv2d(4, 8, 3))
    (row,) = [row for row in summarize(network, (4, 6, 6)).layers if row.layer == str(len(network) - 1)]
    assert (row.macs_1bit, row.macs_32bit) == (0, 8 * 36 * 16)


@torch.no_grad()
@pytest.mark.parametrize("before", [[], [SignActivation()]], ids=["image", "signs"])
def test_real_numbers_that_happen_to_be_signs_are_real(before):
    constant, dead, layer = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), ProjectionConv2d(2, 2, 1)
    for module, value in ((constant, 1.0), (dead, -1.0)):  # puts out this, whatever comes in
        module.weight.zero_()
        module.bias.fill_(value)
    for between in ([constant], [constant, dead]):
        assert summarize(nn.Sequential(*before, *between, layer), (2, 3, 3)).total.macs_1bit == 0
    assert summarize(nn.Sequential(Function(lambda image: image + 1), layer), (2, 3, 3)).total.macs_1bit == 0
    assert summarize(nn.Sequential(Function(lambda image: image - 1), layer), (2, 3, 3)).total.macs_1bit == 0


def test_only_projection_layers_multiply_at_one_bit():
    for layer in (ModulatedConv2d(4, 4, 3, planes=2), nn.Conv2d(4, 4, 3)):
        assert summarize(nn.Sequential(SignActivation(), layer), (4, 5, 5)).total.macs_1bit == 0


def test_the_first_layer_of_mcn_backbones_sees_the_image():
    real = [row.layer for row in summarize(build("mcn8", planes=4), CIFAR).layers if row.macs_32bit]
    assert real == ["features.stem", "classifier"]
    rows = summarize(build("mcn8", planes=4), (3, 31, 33)).layers  # shortcuts whose planes cannot be a view
    assert [row.layer for row in rows if row.macs_32bit] == real


# --- the network is not touched ---------------------------------------------------------------------------------


def test_the_network_is_as_it_was():
    torch.manual_seed(0)
    network = build("wrn7", planes=2, in_channels=1, stages=[2, 2, 3, 4])
    network.features.stage1.eval()
    x = torch.randn(2, *DIGITS)
    network(x).sum().backward()
    before = copy.deepcopy(network.state_dict())
    grads = [parameter.grad.clone() for parameter in network.parameters()]
    modes = [module.training for module in network.modules()]
    layers = [module for module in network.modules() if isinstance(module, QuantizedConv2d)]
    pending = [layer._loss_of_forward for layer in layers]
    random = torch.get_rng_state()
    assert any(loss is not None for loss in pending)
    summarize(network, DIGITS)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(network.parameters(), grads, strict=True))
    assert all(layer._loss_of_forward is loss for layer, loss in zip(layers, pending, strict=True))
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_summary_does_not_depend_on_the_type_of_numbers(dtype):
    network = build("mcn8", family="modulated", planes=2, stages=[2, 2, 3, 4], levels=3)
    expected = summarize(network, CIFAR)
    torch.set_default_dtype(torch.float64)
    try:
        assert summarize(network.to(dtype), CIFAR) == expected
        assert summarize(build("wrn7"), CIFAR) == summarize(build("wrn7").float(), CIFAR)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
def test_the_summary_does_not_depend_on_the_device():
    network = build("wrn7", planes=2)
    expected = summarize(network, CIFAR)
    assert summarize(network.cuda(), CIFAR) == expected
    assert all(parameter.is_cuda for parameter in network.parameters())


@pytest.mark.parametrize("shape", [(3, 32), (3, 32, 0), (-1, 8, 8), (1, 3, 8, 8), ()], ids=str)
def test_wrong_image_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"image_shape must be \(channels, height, width\)") as error:
        summarize(build("wrn7"), shape)
    assert str(shape) in str(error.value)


def test_an_image_that_does_not_fit_is_refused_by_the_layer():
    with pytest.raises(ValueError, match="in_channels=4"):
        summarize(nn.Sequential(ProjectionConv2d(4, 4, 3)), CIFAR)


# --- what is printed --------------------------------------------------------------------------------------------


def number(cell):
    return 0.0 if cell == "-" else float(cell.replace(",", ""))


@pytest.mark.parametrize(
    ("name", "arguments", "header"),
    [
        ("wrn22", {"planes": 4}, "layer output 1-bit 32-bit train kB infer kB 1-bit MACs 32-bit MACs"),
        ("wrn7", {"levels": "ternary"}, "layer output 2-bit 32-bit train kB infer kB 1-bit MACs 32-bit MACs"),
        ("mcn20", {"family": "modulated", "planes": 4}, "layer output 1-bit 32-bit train kB infer kB 32-bit MACs"),
        ("vgg_small", {"family": "full"}, "layer output 32-bit train kB infer kB 32-bit MACs"),
    ],
)
def test_table_is_aligned_and_adds_up(name, arguments, header):
    summary = summarize(build(name, **arguments), CIFAR)
    lines = summary.table().splitlines()
    assert max(map(len, lines)) <= 120
    assert " ".join(lines[0].split()) == header
    at = lines.index("-" * len(lines[0]), 2)
    rows, total = lines[2:at], lines[at + 1]
    assert len(rows) == len(summary.layers)
    assert {len(line) for line in (*rows, total)} == {len(lines[0])}
    columns = len(header.replace(" kB", "").replace(" MACs", "").split()) - 2  # without names and shapes
    numbers = [[number(cell) for cell in row.split()[-columns:]] for row in (*rows, total)]
    for *parts, whole in zip(*numbers, strict=True):
        assert sum(parts) == pytest.approx(whole, abs=1e-6)


def test_table_ends_in_compression():
    lines = summarize(build("resnet18", num_classes=1000), (3, 224, 224)).table().splitlines()
    assert max(map(len, lines)) <= 120
    assert "10,985,472" in lines[-5]
    assert "1 kB is 1000 bytes" in lines[-3]
    assert "221,788,160" in lines[-2]
    assert "1,871,876,096" in lines[-2]
    assert lines[-1] == "Compression: 33.6 Mbit at inference against 374.2 Mbit of the full-precision twin, 11.1x."
    small = summarize(build("wrn7", in_channels=1), DIGITS).table().splitlines()[-1]
    assert "0.148 Mbit at inference against 0.934 Mbit" in small


def test_csv_and_json_hold_the_rows_and_the_total():
    summary = summarize(build("wrn7", in_channels=1, levels="ternary"), DIGITS)
    from_csv = list(csv.DictReader(io.StringIO(summary.to_csv())))
    from_json = json.loads(summary.to_json())
    rows = [*from_json["layers"], from_json["total"]]
    assert [{name: str(value) for name, value in row.items()} for row in rows] == from_csv
    assert len(rows) == len(summary.layers) + 1
    for row, expected in zip(rows, (*summary.layers, summary.total), strict=True):
        assert tuple(row[count] for count in COUNTS) == counts(expected)
        assert math.isclose(row["inference_kB"] * 8000, expected.bits)
        assert math.isclose(row["training_kB"] * 1000, 4 * expected.values_training)
        assert row["operations"] == expected.operations
    assert rows[1] == {
        "layer": "features.stage1.0.conv",
        "kind": "ProjectionConv2d",
        "output_shape": "16x16x16",
        "parameters_1bit": 0,
        "parameters_2bit": 2304,
        "parameters_32bit": 1,
        "macs_1bit": 2304 * 256,
        "macs_32bit": 0,
        "training_kB": 4 * (2304 + 9) / 1000,
        "inference_kB": 0.58,
        "operations": 2304 * 4.0,
    }
    assert from_json["image_shape"] == [1, 16, 16]
    assert from_json["twin_bits"] / from_json["bits"] == from_json["compression"] == summary.compression
