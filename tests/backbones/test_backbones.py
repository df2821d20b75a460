"""All backbones: shapes, gradients, binarized inputs and arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from backbone_helpers import (
    MCN_BACKBONES,
    ONE_BIT_CONVOLUTIONS,
    PCNN_BACKBONES,
    SMALL,
    build,
    build_sizes_only,
    factories,
    inputs_of_one_bit_layers,
    modules_of,
    one_bit_layers,
)
from torch import nn

from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.layers import QuantizedConv2d, SignActivation

# --- structure ------------------------------------------------------------------------------------------------------


def test_number_of_one_bit_convolutions():
    counts = {name: len(one_bit_layers(build_sizes_only(name))) for name in BACKBONES}
    assert counts == ONE_BIT_CONVOLUTIONS


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("wrn22", [16, 16, 32, 64]),
        ("mcn8", [16, 16, 32, 64]),
        ("mcn20", [16, 16, 32, 64]),
        ("mcn_small", [20, 40, 80, 160]),
    ],
)
def test_default_stages_are_the_smallest_published(name, widths):
    default, explicit = (build_sizes_only(name, **arguments) for arguments in ({}, {"widths": widths}))
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (default, explicit)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", PCNN_BACKBONES)
def test_stem_shortcuts_and_classifier_are_full_precision(name):
    network = build(name, widths=SMALL[name], planes=2)
    ordinary = modules_of(network, nn.Conv2d)
    stem, shortcuts = ordinary[0], ordinary[1:]
    assert stem.kernel_size in [(3, 3), (7, 7)]
    assert stem.in_channels == 3
    assert all(layer.kernel_size == (1, 1) for layer in shortcuts)
    assert len(modules_of(network, nn.Linear)) == 1
    assert all(layer.bias is None for layer in ordinary)


@pytest.mark.parametrize(
    ("name", "stem_side"), [("resnet18", 8), ("resnet18_cifar", 32), ("wrn7", 32), ("vgg_small", 32), ("mcn8", 32)]
)
def test_size_of_the_maps_after_the_stem(name, stem_side):
    network = build(name, widths=SMALL[name]).eval()
    sides = []
    network.features.stage1.register_forward_pre_hook(lambda _, inputs: sides.append(tuple(inputs[0].shape[-2:])))
    network(torch.randn(1, 3, 32, 32))
    assert sides == [(stem_side, stem_side)]


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("wrn7", [32, 16, 8]),
        ("resnet18", [8, 4, 2, 1]),
        ("resnet18_cifar", [32, 16, 8, 4]),
        ("vgg_small", [16, 8, 4]),
        ("mcn8", [32, 16, 8]),
        ("mcn20", [32, 16, 8]),
        ("mcn_small", [16, 8, 4, 1]),
    ],
)
def test_stages_halve_the_maps_and_have_planes_times_their_width(name, sides):
    network = build(name, widths=SMALL[name], planes=2).eval()
    shapes = []
    for index in range(len(sides)):
        stage = network.features.get_submodule(f"stage{index + 1}")
        stage.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    network(torch.randn(1, 3, 32, 32))
    widths = SMALL[name][-len(sides) :]
    assert shapes == [(2 * width, side, side) for width, side in zip(widths, sides, strict=True)]


@pytest.mark.parametrize(("name", "convolutions"), [("wrn7", 4), ("mcn8", 7), ("mcn_small", 4)])
def test_full_precision_networks_have_no_one_bit_layers(name, convolutions):
    network = build(name, family="full")
    assert modules_of(network, (QuantizedConv2d, SignActivation)) == []
    assert sum(layer.kernel_size == (3, 3) for layer in modules_of(network, nn.Conv2d)) == convolutions


# --- forward and backward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["projection", "modulated", "full"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns_from_images_of_any_size(name, family):
    torch.manual_seed(0)
    for (height, width), in_channels in [((32, 32), 3), ((33, 31), 1), ((9, 9), 4)]:
        network = build(name, widths=SMALL[name], planes=2, num_classes=5, in_channels=in_channels, family=family)
        logits = network(torch.randn(4, in_channels, height, width))
        assert logits.shape == (4, 5)
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 4]))
        (loss + sum(layer.quantization_loss() for layer in one_bit_layers(network))).backward()
        idle = [
            parameter_name
            for parameter_name, parameter in network.named_parameters()
            if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()
        ]
        assert idle == []


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
def test_every_projection_convolution_sees_plus_and_minus_one(name, training):
    torch.manual_seed(0)
    network = build(name, widths=SMALL[name], planes=2).train(training)
    images = torch.randn(2, 3, 32, 32)
    seen = inputs_of_one_bit_layers(network, images)
    if name in MCN_BACKBONES:
        assert torch.equal(seen.pop(0), images.repeat_interleave(2, dim=1))  # the images are not binarized
    expected = ONE_BIT_CONVOLUTIONS[name] - (name in MCN_BACKBONES)
    assert [values.unique().tolist() for values in seen] == [[-1, 1]] * expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["wrn7", "resnet18"])
def test_classifier_reads_the_mean_of_the_last_maps(name):
    torch.manual_seed(0)
    network = build(name, widths=SMALL[name]).eval()
    last_stage = network.features.get_submodule(f"stage{len(SMALL[name]) - 1}")
    maps = []
    last_stage.register_forward_hook(lambda _, __, output: maps.append(output))
    logits = network(torch.randn(2, 3, 32, 32))
    expected = maps[0].mean(dim=(2, 3)) @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(logits, expected)


# --- arguments ------------------------------------------------------------------------------------------------------


def test_unknown_backbones_are_refused():
    with pytest.raises(ValueError, match=r"backbone must be one of .*, but got 'wrn23'") as error:
        build("wrn23")
    assert all(name in str(error.value) for name in BACKBONES)


@pytest.mark.parametrize(
    ("name", "count"),
    [("wrn22", 4), ("resnet18", 5), ("resnet34_cifar", 5), ("vgg_small", 3), ("mcn20", 4), ("mcn_small", 4)],
)
@pytest.mark.parametrize("wrong", ["too few", "too many", "zero", "negative", "none"])
def test_wrong_stages_are_refused(name, count, wrong):
    widths = {
        "too few": [4] * (count - 1),
        "too many": [4] * (count + 1),
        "zero": [4] * (count - 1) + [0],
        "negative": [-4] + [4] * (count - 1),
        "none": [],
    }[wrong]
    with pytest.raises(ValueError, match=f"widths must be {count} positive whole numbers") as error:
        build(name, widths=widths)
    assert str(widths) in str(error.value)


@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
def test_zero_classes_or_channels_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument} must be an integer of at least 1, but got 0"):
        build("wrn7", **{argument: 0})


@pytest.mark.parametrize(
    ("family", "depth", "allowed"),
    [("wrn22", 23, "3n \\+ 4"), ("resnet18", 50, "18, 34"), ("mcn20", 22, "6n \\+ 2"), ("mcn8", 2, "6n \\+ 2")],
)
def test_wrong_depths_are_refused(family, depth, allowed):
    with pytest.raises(ValueError, match=f"depth must be .*{allowed}.*{depth}"):
        BACKBONES[family](10, 3, *factories("full", 1), depth=depth)


@pytest.mark.parametrize("name", PCNN_BACKBONES)
def test_dropout_is_refused_for_a_backbone_without_it(name):
    with pytest.raises(ValueError, match=rf"dropout must be 0 for backbone {name}, .* but got 0.5"):
        build_sizes_only(name, dropout=0.5)
    assert modules_of(build_sizes_only(name, dropout=0.0), nn.Dropout) == []


@pytest.mark.parametrize("name", ["mcn8", "mcn_small", "wrn7"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_dropout_is_a_rate_below_one(name, rate):
    with pytest.raises(ValueError, match=rf"dropout must be a number in \[0, 1\), but got {rate}"):
        build_sizes_only(name, dropout=rate)
