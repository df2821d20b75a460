"""Backbones: published sizes, the block, the shortcuts, what binarises, and inputs of any size."""

from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from pcnn_lightning.backbones import BACKBONES, OneBitBlock, build_backbone
from pcnn_lightning.layers import ProjectionConv2d, SignActivation

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SMALL = {name: [4, 6, 8] if name == "vgg_small" else [4, 4, 6, 8] for name in BACKBONES}
SMALL |= {name: [4, 4, 6, 8, 8] for name in BACKBONES if name.startswith("resnet")}

# How many 3×3 convolutions are 1-bit: all but the first.
ONE_BIT_CONVOLUTIONS = {
    "wrn7": 3,
    "wrn22": 18,
    "wrn40": 36,
    "resnet18": 16,
    "resnet34": 32,
    "resnet18_cifar": 16,
    "resnet34_cifar": 32,
    "vgg_small": 5,
}


def build(name, *, num_classes=10, in_channels=3, planes=1, full_precision=False, **arguments):
    if full_precision:
        convolution, activation = partial(nn.Conv2d, bias=False), nn.Identity
    else:
        convolution, activation = partial(ProjectionConv2d, projections=planes), SignActivation
    return build_backbone(name, num_classes, in_channels, convolution, activation, planes=planes, **arguments)


def build_sizes_only(name, **arguments):
    with torch.device("meta"):
        return build(name, **arguments)


def modules_of(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


def projection_layers(network):
    return modules_of(network, ProjectionConv2d)


# --- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "planes", "millions"),
    [
        ([16, 16, 32, 64], 1, 0.27),
        ([16, 32, 64, 128], 1, 1.08),
        ([64, 64, 128, 256], 1, 4.32),
        ([16, 16, 32, 64], 4, 1.08),
        ([16, 32, 64, 128], 4, 4.31),
        ([64, 64, 128, 256], 4, 17.29),
    ],
)
def test_wrn22_has_the_published_number_of_learned_parameters(stages, planes, millions):
    network = build_sizes_only("wrn22", stages=stages, planes=planes)
    learned = sum(module.weight.numel() for module in modules_of(network, (nn.Conv2d, nn.Linear, ProjectionConv2d)))
    assert round(learned / 1e6, 2) == millions


def test_default_stages_of_wrn22_are_the_smallest_published():
    default, explicit = (build_sizes_only("wrn22", **arguments) for arguments in ({}, {"stages": [16, 16, 32, 64]}))
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (default, explicit)]
    assert shapes[0] == shapes[1]


def basic_stage(in_channels, out_channels, blocks):
    return 9 * in_channels * out_channels + (blocks - 1) * 9 * out_channels**2


@pytest.mark.parametrize("stem", ["", "_cifar"])
@pytest.mark.parametrize(
    ("depth", "blocks", "expected"), [(18, (4, 4, 4, 4), 10_985_472), (34, (6, 8, 12, 6), 21_086_208)]
)
def test_resnet_has_the_published_number_of_binary_weights(depth, blocks, expected, stem):
    layers = projection_layers(build_sizes_only(f"resnet{depth}{stem}", num_classes=1000))
    assert len(layers) == sum(blocks)
    assert sum(layer.quantized_weight().numel() for layer in layers) == expected
    widths = [64, 64, 128, 256, 512]
    assert expected == sum(map(basic_stage, widths, widths[1:], blocks))


def test_every_registered_backbone_has_its_one_bit_convolutions():
    counts = {name: len(projection_layers(build_sizes_only(name))) for name in BACKBONES}
    assert counts == ONE_BIT_CONVOLUTIONS


@pytest.mark.parametrize("name", BACKBONES)
def test_stem_shortcuts_and_classifier_are_full_precision(name):
    network = build(name, stages=SMALL[name], planes=2)
    ordinary = modules_of(network, nn.Conv2d)
    stem, shortcuts = ordinary[0], ordinary[1:]
    assert stem.kernel_size in [(3, 3), (7, 7)]
    assert stem.in_channels == 3
    assert all(layer.kernel_size == (1, 1) for layer in shortcuts)
    assert len(modules_of(network, nn.Linear)) == 1
    assert all(layer.bias is None for layer in ordinary)


def test_depth_counts_stem_shortcuts_and_classifier():
    for depth in (22, 40):
        network = build_sizes_only(f"wrn{depth}")
        assert len(modules_of(network, (nn.Conv2d, nn.Linear, ProjectionConv2d))) == depth


@pytest.mark.parametrize(
    ("name", "stem_side"), [("resnet18", 8), ("resnet18_cifar", 32), ("wrn7", 32), ("vgg_small", 32)]
)
def test_stem_keeps_or_quarters_the_image(name, stem_side):
    network = build(name, stages=SMALL[name]).eval()
    sides = []
    network.features.stage1.register_forward_pre_hook(lambda _, inputs: sides.append(tuple(inputs[0].shape[-2:])))
    network(torch.randn(1, 3, 32, 32))
    assert sides == [(stem_side, stem_side)]


@pytest.mark.parametrize(
    ("name", "sides"),
    [("wrn7", [32, 16, 8]), ("resnet18", [8, 4, 2, 1]), ("resnet18_cifar", [32, 16, 8, 4]), ("vgg_small", [16, 8, 4])],
)
def test_stages_halve_the_maps_and_have_planes_times_their_width(name, sides):
    network = build(name, stages=SMALL[name], planes=2).eval()
    shapes = []
    for index in range(len(sides)):
        stage = network.features.get_submodule(f"stage{index + 1}")
        stage.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    network(torch.randn(1, 3, 32, 32))
    widths = SMALL[name][-len(sides) :]
    assert shapes == [(2 * width, side, side) for width, side in zip(widths, sides, strict=True)]


# --- forward and backward ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_precision", [False, True], ids=["projection", "full"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns_from_images_of_any_size(name, full_precision):
    torch.manual_seed(0)
    for (height, width), in_channels in [((32, 32), 3), ((33, 31), 1), ((9, 9), 4)]:
        network = build(
            name, stages=SMALL[name], planes=2, num_classes=5, in_channels=in_channels, full_precision=full_precision
        )
        logits = network(torch.randn(4, in_channels, height, width))
        assert logits.shape == (4, 5)
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 4]))
        (loss + sum(layer.projection_loss() for layer in projection_layers(network))).backward()
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
    network = build(name, stages=SMALL[name], planes=2).train(training)
    values = {}

    def record(layer, inputs):
        values[layer] = inputs[0].unique().tolist()

    for layer in projection_layers(network):
        layer.register_forward_pre_hook(record)
    network(torch.randn(2, 3, 32, 32))
    assert list(values.values()) == [[-1, 1]] * ONE_BIT_CONVOLUTIONS[name]


def test_full_precision_networks_hold_nothing_of_one_bit():
    network = build("wrn7", full_precision=True)
    assert modules_of(network, (ProjectionConv2d, SignActivation)) == []
    assert sum(layer.kernel_size == (3, 3) for layer in modules_of(network, nn.Conv2d)) == 4


# --- the block --------------------------------------------------------------------------------------------------


def randomise(module):
    """Batch norms and PReLUs as if trained, so that no factor is one and no shift zero."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values, shift in ((part.weight, 1), (part.bias, 0), (part.running_mean, 0)):
                values.data.copy_(shift + 0.5 * torch.randn(values.shape, generator=generator))
            part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
        elif isinstance(part, nn.PReLU):
            part.weight.data.copy_(torch.randn(part.weight.shape, generator=generator))


def blocks_of(name, **arguments):
    torch.manual_seed(0)
    network = build(name, **{"stages": SMALL[name], "planes": 2, **arguments}).double().eval()
    randomise(network)
    return modules_of(network, OneBitBlock)


def normalise(x, norm):
    centred = (x - norm.running_mean.reshape(-1, 1, 1)) / (norm.running_var.reshape(-1, 1, 1) + norm.eps).sqrt()
    return centred * norm.weight.reshape(-1, 1, 1) + norm.bias.reshape(-1, 1, 1)


def convolution_branch(x, block, stride):
    quantized = reference.quantize(block.conv.weight, block.conv.projection, levels=block.conv.levels)
    return F.conv2d(reference.sign(normalise(x, block.norm)), quantized, stride=stride, padding=1)


def prelu(x, block):
    return torch.where(x > 0, x, block.prelu.weight.reshape(-1, 1, 1) * x)


def pool_windows(x, reduce):
    """Each window of 2×2 reduced to one number; one that hangs over the edge counts what lies inside."""
    rows, columns = range(0, x.shape[-2], 2), range(0, x.shape[-1], 2)
    return torch.stack(
        [torch.stack([reduce(x[..., r : r + 2, c : c + 2], dim=(-2, -1)) for c in columns], dim=-1) for r in rows],
        dim=-2,
    )


def projected_shortcut(x, block, groups):
    """1×1 convolution, each group of output channels from its group of input channels, then BN."""
    weight = block.shortcut.conv.weight
    parts = zip(x.chunk(groups, dim=1), weight.chunk(groups), strict=True)
    mixed = torch.cat([torch.einsum("oi,bihw->bohw", part[:, :, 0, 0], maps) for maps, part in parts], dim=1)
    return normalise(mixed, block.shortcut.norm)


@torch.no_grad()
@pytest.mark.parametrize("name", ["wrn7", "wrn22", "resnet18", "resnet18_cifar"])
def test_a_block_that_keeps_its_shape_adds_its_input(name):
    block = blocks_of(name)[0]
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), prelu(convolution_branch(x, block, 1) + x, block), **EXACT)
    assert list(block.shortcut.parameters()) == []
    assert block.prelu.weight.shape == (8,)  # a slope per channel


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("planes", [1, 2])
def test_a_block_that_halves_its_maps_adds_the_pooled_projection_of_its_input(planes, size):
    block = blocks_of("wrn7", planes=planes)[1]
    x = torch.randn(2, 4 * planes, *size, dtype=torch.float64)
    # J = 1 quantises with the mean of W by default.
    forward = "mean" if planes == 1 else "full"
    quantized = reference.quantize(block.conv.weight, block.conv.projection, projection_forward=forward)
    branch = F.conv2d(reference.sign(normalise(x, block.norm)), quantized, stride=2, padding=1)
    expected = prelu(branch + pool_windows(projected_shortcut(x, block, planes), torch.mean), block)
    torch.testing.assert_close(block(x), expected, **EXACT)


@torch.no_grad()
def test_a_block_that_changes_channels_at_stride_one_does_not_pool():
    block = blocks_of("wrn7", stages=[4, 6, 8, 8])[0]
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = prelu(convolution_branch(x, block, 1) + projected_shortcut(x, block, 2), block)
    torch.testing.assert_close(block(x), expected, **EXACT)
    assert modules_of(block, (nn.AvgPool2d, nn.MaxPool2d)) == []


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 4), (7, 5)], ids=str)
def test_a_block_of_vgg_has_no_shortcut_and_pools_by_maxima_before_prelu(size):
    last = blocks_of("vgg_small")[0]
    assert (last.prelu.weight < 0).any()  # else the order of pool and PReLU would not show
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    expected = prelu(pool_windows(convolution_branch(x, last, 1), torch.amax), last)
    torch.testing.assert_close(last(x), expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["wrn7", "resnet18"])
def test_classifier_reads_the_mean_of_the_last_maps(name):
    torch.manual_seed(0)
    network = build(name, stages=SMALL[name]).eval()
    last_stage = network.features.get_submodule(f"stage{len(SMALL[name]) - 1}")
    maps = []
    last_stage.register_forward_hook(lambda _, __, output: maps.append(output))
    logits = network(torch.randn(2, 3, 32, 32))
    expected = maps[0].mean(dim=(2, 3)) @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(logits, expected)


# --- arguments --------------------------------------------------------------------------------------------------


def test_unknown_backbone_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"backbone must be one of .*, but got 'wrn23'") as error:
        build("wrn23")
    assert all(name in str(error.value) for name in BACKBONES)


@pytest.mark.parametrize(("name", "count"), [("wrn22", 4), ("resnet18", 5), ("resnet34_cifar", 5), ("vgg_small", 3)])
@pytest.mark.parametrize("wrong", ["too few", "too many", "zero", "negative", "none"])
def test_wrong_stages_are_refused_with_the_number_wanted(name, count, wrong):
    stages = {
        "too few": [4] * (count - 1),
        "too many": [4] * (count + 1),
        "zero": [4] * (count - 1) + [0],
        "negative": [-4] + [4] * (count - 1),
        "none": [],
    }[wrong]
    with pytest.raises(ValueError, match=f"stages must be {count} positive numbers") as error:
        build(name, stages=stages)
    assert str(stages) in str(error.value)


@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
def test_a_network_needs_classes_and_channels(argument):
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, but got 0"):
        build("wrn7", **{argument: 0})


@pytest.mark.parametrize(("family", "depth", "allowed"), [("wrn22", 23, "3n \\+ 4"), ("resnet18", 50, "18, 34")])
def test_wrong_depths_are_refused(family, depth, allowed):
    with pytest.raises(ValueError, match=f"depth must be .*{allowed}.*{depth}"):
        BACKBONES[family](10, 3, partial(nn.Conv2d, bias=False), nn.Identity, depth=depth)
