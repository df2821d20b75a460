"""The tables of a summary, and what ``summarize`` leaves untouched."""

import copy
import csv
import io
import itertools
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from summary_helpers import CIFAR, COUNTS, DIGITS, build, counts
from torch import nn

from pcnn_lightning.layers import ProjectionConv2d, QuantizedConv2d
from pcnn_lightning.reports.summary import LayerSummary, _grouped, summarize

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


UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}


def number(cell):
    return 0.0 if cell == "-" else float(cell.rstrip("kMG").replace(",", "")) * UNITS.get(cell[-1], 1)


def parts(summary):
    """Header, names and numbers of the rows and of the total, and the words below the table."""
    header, body, total, words = re.split(r"^─+\n|\n\n|─+\n", re.sub(r"\n─+\n(total.*)", r"\n\n\1", summary.table()))
    *columns, last = ([line.split() for line in part.splitlines()] for part in (header, body, total))
    names = [re.match(r"(\d+ × )?\S+", line)[0] for line in body.splitlines()]
    count = len(columns[0][-1]) - 2
    return columns[0], names, [[number(cell) for cell in row[-count:]] for row in (*columns[1], *last)], words


def spelled_out(name):
    """The names that a row such as ``4 × stage1.0-1.conv1-2`` stands for."""
    count, _, pattern = name.rpartition(" × ")
    ranges = re.split(r"(\d+-\d+)", pattern)
    choices = [
        [part] if not at % 2 else map(str, range(int(part.split("-")[0]), int(part.split("-")[1]) + 1))
        for at, part in enumerate(ranges)
    ]
    names = ["".join(choice) for choice in itertools.product(*choices)]
    assert len(names) == int(count or 1)
    return names


NETWORKS = [
    ("wrn22", {"planes": 4}, "1-bit 32-bit train infer 1-bit 32-bit"),
    ("wrn7", {"stage": "ternary"}, "2-bit 32-bit train infer 1-bit 32-bit"),
    ("mcn20", {"family": "modulated", "planes": 4}, "1-bit 32-bit train infer 32-bit"),
    ("vgg_small", {"family": "full"}, "32-bit train infer 32-bit"),
    ("resnet34", {}, "1-bit 32-bit train infer 1-bit 32-bit"),
]


@pytest.mark.parametrize(("name", "arguments", "header"), NETWORKS)
def test_tables_add_up_and_fit(name, arguments, header, monkeypatch):
    summary = summarize(build(name, **arguments), (3, 224, 224) if name == "resnet34" else CIFAR)
    (_, short_header), short_names, short, short_words = parts(summary)
    assert max(map(len, summary.table().splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "130")
    (above, below), names, exact, words = parts(summary)
    assert max(map(len, summary.table().splitlines())) <= 130
    assert len(above) == len(below) - 2
    assert below == short_header == ["layer", "output", *header.split()]
    assert names == short_names
    for *column, whole in zip(*exact, strict=True):
        assert sum(column) == pytest.approx(whole, abs=1)  # a byte, where bits are not whole ones
    for row, rounded in zip(exact, short, strict=True):
        assert rounded == pytest.approx(row, rel=0.005)
    assert short_words.startswith("k, M and G are 10^3, 10^6 and 10^9")
    assert " ".join(short_words.split()).endswith(" ".join(words.split()))
    layers = [row.layer for row in summary.layers if " × " not in row.layer]
    assert [one for row in names for one in (spelled_out(row) if "." in row else [row])][: len(layers)] == layers
    assert len(names) <= 18


def test_the_rows_of_mcn20():
    _, names, _, _ = parts(summarize(build("mcn20", family="modulated", planes=4), CIFAR))
    assert names == [
        *("features.stem", "6 × features.stage1.0-2.conv1-2"),
        *("features.stage2.0.conv1", "features.stage2.0.conv2", "features.stage2.0.shortcut.conv"),
        "4 × features.stage2.1-2.conv1-2",
        *("features.stage3.0.conv1", "features.stage3.0.conv2", "features.stage3.0.shortcut.conv"),
        "4 × features.stage3.1-2.conv1-2",
        *("classifier", "19 × BatchNorm2d"),
    ]


NAMES = [f"stage{stage}.{block}.conv{conv}" for stage in (1, 2) for block in (0, 1, 9, 10, 11) for conv in (1, 2)]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 2)), unique_by=lambda pair: pair[0]).map(sorted))
def test_grouped_rows_stand_for_equal_layers(layers):
    rows = [LayerSummary(name, "Conv2d", (size, 8, 8), *[size] * 7) for name, size in layers]
    found = _grouped(rows)
    assert sorted(name for row in found for name in spelled_out(row.layer)) == sorted(name for name, _ in layers)
    size_of = dict(layers)
    for row in found:
        sizes = [size_of[name] for name in spelled_out(row.layer)]
        assert len(set(sizes)) == 1
        assert row.output_shape == (sizes[0], 8, 8)
        assert counts(row) == (sum(sizes),) * 5


def test_table_ends_in_compression(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    lines = summarize(build("resnet18", num_classes=1000), (3, 224, 224)).table().splitlines()
    assert "10,985,472" in lines[-5]
    assert lines[-3].startswith("Parameters at inference: 10,985,472 at 1 bit, 707,")
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
