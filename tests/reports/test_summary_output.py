"""The tables of a summary, and what ``summarize`` leaves untouched."""

import copy
import csv
import io
import json
import math

import pytest
import torch
from summary_helpers import CIFAR, COUNTS, DIGITS, build, counts
from torch import nn

from pcnn_lightning.layers import ProjectionConv2d, QuantizedConv2d
from pcnn_lightning.reports.summary import summarize

# --- side effects ---------------------------------------------------------------------------------------------------


def test_summarize_does_not_modify_the_network():
    torch.manual_seed(0)
    network = build("wrn7", planes=2, in_channels=1, widths=[2, 2, 3, 4])
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
def test_summary_does_not_depend_on_dtype(dtype):
    network = build("mcn8", family="modulated", planes=2, widths=[2, 2, 3, 4], levels=3)
    expected = summarize(network, CIFAR)
    torch.set_default_dtype(torch.float64)
    try:
        assert summarize(network.to(dtype), CIFAR) == expected
        assert summarize(build("wrn7"), CIFAR) == summarize(build("wrn7").float(), CIFAR)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
def test_summary_does_not_depend_on_device():
    network = build("wrn7", planes=2)
    expected = summarize(network, CIFAR)
    assert summarize(network.cuda(), CIFAR) == expected
    assert all(parameter.is_cuda for parameter in network.parameters())


@pytest.mark.parametrize("shape", [(3, 32), (3, 32, 0), (-1, 8, 8), (1, 3, 8, 8), ()], ids=str)
def test_wrong_image_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"image_shape must be \(channels, height, width\)") as error:
        summarize(build("wrn7"), shape)
    assert str(shape) in str(error.value)


def test_images_with_other_channels_are_refused_by_the_layer():
    with pytest.raises(ValueError, match="in_channels=4"):
        summarize(nn.Sequential(ProjectionConv2d(4, 4, 3)), CIFAR)


# --- output ---------------------------------------------------------------------------------------------------------


def number(cell):
    return 0.0 if cell == "-" else float(cell.replace(",", ""))


@pytest.mark.parametrize(
    ("name", "arguments", "header"),
    [
        ("wrn22", {"planes": 4}, "layer output 1-bit 32-bit train kB infer kB 1-bit MACs 32-bit MACs"),
        ("wrn7", {"stage": "ternary"}, "layer output 2-bit 32-bit train kB infer kB 1-bit MACs 32-bit MACs"),
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
    summary = summarize(build("wrn7", in_channels=1, stage="ternary"), DIGITS)
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
