"""Backbones: published sizes, blocks, shortcuts, what binarises, dropout, and inputs of any size."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from pcnn_lightning.backbones import BACKBONES, OneBitBlock, build_backbone
from pcnn_lightning.backbones.mcn import PlaneConv, RepeatChannels, TwoConvBlock
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, QuantizedConv2d, SignActivation

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SMALL = {name: [4, 6, 8] if name == "vgg_small" else [4, 4, 6, 8] for name in BACKBONES}
SMALL |= {name: [4, 4, 6, 8, 8] for name in BACKBONES if name.startswith("resnet")}

# Made for MCN, with its repeated input; in the others the first convolution and the shortcuts are full precision.
MCN_BACKBONES = [name for name in BACKBONES if name.startswith("mcn")]
PCNN_BACKBONES = [name for name in BACKBONES if name not in MCN_BACKBONES]

# How many convolutions are 1-bit: all 3×3 ones but the first, and in MCN's backbones that and two 1×1 shortcuts too.
ONE_BIT_CONVOLUTIONS = {
    "wrn7": 3,
    "wrn22": 18,
    "wrn40": 36,
    "resnet18": 16,
    "resnet34": 32,
    "resnet18_cifar": 16,
    "resnet34_cifar": 32,
    "vgg_small": 5,
    "mcn8": 7 + 2,
    "mcn20": 19 + 2,
    "mcn_small": 4,
}


def factories(family, default_planes):
    """What makes a family's convolutions, each with a keyword ``planes``, and what binarises their input."""

    def projection(*shape, planes=default_planes):
        return ProjectionConv2d(*shape, projections=planes)

    def modulated(*shape, planes=default_planes):
        return ModulatedConv2d(*shape, planes=planes, filter_loss_weight=0.1)

    def full(*shape, planes=default_planes):
        return nn.Conv2d(*shape, bias=False)

    return {
        "projection": (projection, SignActivation),
        "modulated": (modulated, nn.Identity),
        "full": (full, nn.Identity),
    }[family]


def build(name, *, num_classes=10, in_channels=3, planes=1, family="projection", **arguments):
    convolution, activation = factories(family, planes)
    return build_backbone(name, num_classes, in_channels, convolution, activation, planes=planes, **arguments)


def build_sizes_only(name, **arguments):
    with torch.device("meta"):
        return build(name, **arguments)


def modules_of(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


def one_bit_layers(network):
    return modules_of(network, QuantizedConv2d)


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


@pytest.mark.parametrize(
    ("stages", "millions"),
    [
        ([16, 16, 32, 64], 1.08),
        ([16, 32, 64, 128], 4.28),
        ([32, 64, 128, 256], 17.09),
        ([64, 64, 128, 256], 17.16),
    ],
)
def test_mcn20_has_the_published_number_of_learned_parameters(stages, millions):
    network = build_sizes_only("mcn20", stages=stages, planes=4, family="modulated")
    learned = sum(layer.weight.numel() + layer.modulation.numel() for layer in one_bit_layers(network))
    learned += sum(parameter.numel() for parameter in network.classifier.parameters())
    assert round(learned / 1e6, 2) == millions
    norms = sum(parameter.numel() for norm in modules_of(network, nn.BatchNorm2d) for parameter in norm.parameters())
    assert learned + norms == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("wrn22", [16, 16, 32, 64]),
        ("mcn8", [16, 16, 32, 64]),
        ("mcn20", [16, 16, 32, 64]),
        ("mcn_small", [20, 40, 80, 160]),
    ],
)
def test_default_stages_are_the_smallest_published(name, stages):
    default, explicit = (build_sizes_only(name, **arguments) for arguments in ({}, {"stages": stages}))
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (default, explicit)]
    assert shapes[0] == shapes[1]


def basic_stage(in_channels, out_channels, blocks):
    return 9 * in_channels * out_channels + (blocks - 1) * 9 * out_channels**2


@pytest.mark.parametrize("stem", ["", "_cifar"])
@pytest.mark.parametrize(
    ("depth", "blocks", "expected"), [(18, (4, 4, 4, 4), 10_985_472), (34, (6, 8, 12, 6), 21_086_208)]
)
def test_resnet_has_the_published_number_of_binary_weights(depth, blocks, expected, stem):
    layers = one_bit_layers(build_sizes_only(f"resnet{depth}{stem}", num_classes=1000))
    assert len(layers) == sum(blocks)
    assert sum(layer.quantized_weight().numel() for layer in layers) == expected
    widths = [64, 64, 128, 256, 512]
    assert expected == sum(map(basic_stage, widths, widths[1:], blocks))


def test_every_registered_backbone_has_its_one_bit_convolutions():
    counts = {name: len(one_bit_layers(build_sizes_only(name))) for name in BACKBONES}
    assert counts == ONE_BIT_CONVOLUTIONS


@pytest.mark.parametrize("name", PCNN_BACKBONES)
def test_stem_shortcuts_and_classifier_are_full_precision(name):
    network = build(name, stages=SMALL[name], planes=2)
    ordinary = modules_of(network, nn.Conv2d)
    stem, shortcuts = ordinary[0], ordinary[1:]
    assert stem.kernel_size in [(3, 3), (7, 7)]
    assert stem.in_channels == 3
    assert all(layer.kernel_size == (1, 1) for layer in shortcuts)
    assert len(modules_of(network, nn.Linear)) == 1
    assert all(layer.bias is None for layer in ordinary)


@pytest.mark.parametrize("family", ["modulated", "projection"])
@pytest.mark.parametrize("name", MCN_BACKBONES)
def test_all_convolutions_of_mcn_are_one_bit(name, family):
    network = build(name, stages=SMALL[name], planes=2, family=family)
    first, *others = one_bit_layers(network)
    assert modules_of(network, nn.Conv2d) == []
    assert (first.in_channels, first.out_channels, first.kernel_size) == (6, 8, (3, 3))
    assert len(others) + 1 == ONE_BIT_CONVOLUTIONS[name]
    assert len(modules_of(network, nn.Linear)) == (2 if name == "mcn_small" else 1)


def test_depth_counts_stem_shortcuts_and_classifier():
    for depth in (22, 40):
        network = build_sizes_only(f"wrn{depth}")
        assert len(modules_of(network, (nn.Conv2d, nn.Linear, ProjectionConv2d))) == depth


@pytest.mark.parametrize("depth", [8, 20])
def test_depth_of_mcn_counts_stem_and_classifier_but_no_shortcuts(depth):
    network = build_sizes_only(f"mcn{depth}", family="modulated")
    assert sum(layer.kernel_size == (3, 3) for layer in one_bit_layers(network)) + 1 == depth
    blocks = [len(network.features.get_submodule(f"stage{index}")) for index in (1, 2, 3)]
    assert blocks == [(depth - 2) // 6] * 3


@pytest.mark.parametrize(
    ("stages", "maps"),
    [
        ([4, 4, 6, 8], [(4, 6), (6, 8)]),
        ([4, 4, 4, 4], [(4, 4), (4, 4)]),
        ([4, 5, 6, 8], [(4, 5), (5, 6), (6, 8)]),
    ],
)
def test_shortcuts_of_mcn_are_from_map_to_map_where_the_shape_changes(stages, maps):
    network = build("mcn8", stages=stages, planes=4, family="modulated")
    shortcuts = [layer for layer in one_bit_layers(network) if layer.kernel_size == (1, 1)]
    assert [(layer.in_channels, layer.out_channels) for layer in shortcuts] == maps
    assert [layer.weight.numel() for layer in shortcuts] == [before * after for before, after in maps]
    assert {layer.planes for layer in shortcuts} == {1}
    assert {layer.planes for layer in one_bit_layers(network) if layer.kernel_size == (3, 3)} == {4}


@pytest.mark.parametrize(
    ("name", "stem_side"), [("resnet18", 8), ("resnet18_cifar", 32), ("wrn7", 32), ("vgg_small", 32), ("mcn8", 32)]
)
def test_stem_keeps_or_quarters_the_image(name, stem_side):
    network = build(name, stages=SMALL[name]).eval()
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
    network = build(name, stages=SMALL[name], planes=2).eval()
    shapes = []
    for index in range(len(sides)):
        stage = network.features.get_submodule(f"stage{index + 1}")
        stage.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    network(torch.randn(1, 3, 32, 32))
    widths = SMALL[name][-len(sides) :]
    assert shapes == [(2 * width, side, side) for width, side in zip(widths, sides, strict=True)]


# --- forward and backward ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["projection", "modulated", "full"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns_from_images_of_any_size(name, family):
    torch.manual_seed(0)
    for (height, width), in_channels in [((32, 32), 3), ((33, 31), 1), ((9, 9), 4)]:
        network = build(name, stages=SMALL[name], planes=2, num_classes=5, in_channels=in_channels, family=family)
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


def inputs_of_one_bit_layers(network, images):
    seen = []
    for layer in one_bit_layers(network):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    network(images)
    return seen


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
def test_every_projection_convolution_sees_plus_and_minus_one(name, training):
    torch.manual_seed(0)
    network = build(name, stages=SMALL[name], planes=2).train(training)
    images = torch.randn(2, 3, 32, 32)
    seen = inputs_of_one_bit_layers(network, images)
    if name in MCN_BACKBONES:
        assert torch.equal(seen.pop(0), images.repeat_interleave(2, dim=1))  # real: there is nothing to binarise it
    expected = ONE_BIT_CONVOLUTIONS[name] - (name in MCN_BACKBONES)
    assert [values.unique().tolist() for values in seen] == [[-1, 1]] * expected


@pytest.mark.parametrize("name", MCN_BACKBONES)
def test_every_modulated_convolution_sees_real_numbers_from_relu_and_the_first_the_images(name):
    torch.manual_seed(0)
    network = build(name, stages=SMALL[name], planes=2, family="modulated")
    images = torch.randn(2, 3, 32, 32)
    first, *others = inputs_of_one_bit_layers(network, images)
    assert torch.equal(first, images.repeat_interleave(2, dim=1))
    assert len(others) == ONE_BIT_CONVOLUTIONS[name] - 1
    assert all(values.min() == 0 for values in others)
    assert all(len(values.unique()) > 100 for values in others)


@pytest.mark.parametrize(("name", "convolutions"), [("wrn7", 4), ("mcn8", 7), ("mcn_small", 4)])
def test_full_precision_networks_hold_nothing_of_one_bit(name, convolutions):
    network = build(name, family="full")
    assert modules_of(network, (QuantizedConv2d, SignActivation)) == []
    assert sum(layer.kernel_size == (3, 3) for layer in modules_of(network, nn.Conv2d)) == convolutions


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


def trained(name, **arguments):
    torch.manual_seed(0)
    network = build(name, **{"stages": SMALL[name], "planes": 2, **arguments}).double().eval()
    randomise(network)
    return network


def blocks_of(name, **arguments):
    return modules_of(trained(name, **arguments), OneBitBlock)


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


# --- what only MCN's backbones have -----------------------------------------------------------------------------


def test_channels_are_repeated_side_by_side():
    x = torch.randn(2, 3, 5, 4)
    repeated = RepeatChannels(4)(x)
    order = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]  # R, R, R, R, G, ...
    assert repeated.shape == (2, 12, 5, 4)
    assert all(torch.equal(repeated[:, place], x[:, channel]) for place, channel in enumerate(order))


def kernels_of(layer):
    """What a 1-bit layer of this file's convolves with, from the equations; an ordinary one's are its weight."""
    if isinstance(layer, ModulatedConv2d):
        return reference.modulate(reference.quantize_by_levels(layer.weight), layer.modulation)
    if isinstance(layer, ProjectionConv2d):
        forward = "mean" if len(layer.projection) == 1 else "full"
        return reference.quantize(layer.weight, layer.projection, projection_forward=forward)
    return layer.weight


def plane_by_plane(x, shortcut, planes):
    """1×1 from map to map of every ``stride``-th pixel: plane k of the output from plane k of the input."""
    kernels = kernels_of(shortcut.conv)[:, :, 0, 0]
    result = torch.empty(len(x), len(kernels) * planes, *x[..., :: shortcut.stride, :: shortcut.stride].shape[-2:])
    result = result.double()
    for k in range(planes):
        picked = x[:, k::planes, :: shortcut.stride, :: shortcut.stride]
        result[:, k::planes] = torch.einsum("oi,bihw->bohw", kernels, picked)
    return result


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("planes", [1, 3, 4])
@pytest.mark.parametrize("family", ["modulated", "projection", "full"])
def test_a_plane_shortcut_is_the_same_sum_over_maps_on_each_plane(family, planes, stride, size):
    torch.manual_seed(0)
    shortcut = PlaneConv(3 * planes, 5 * planes, factories(family, planes)[0], stride, planes).double()
    assert sum(parameter.numel() for parameter in shortcut.parameters()) == 3 * 5 + (family != "full")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3 * planes, *size, dtype=torch.float64).to(memory_format=memory_format)
        y = shortcut(x)
        assert y.shape == (2, 5 * planes, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        torch.testing.assert_close(y, plane_by_plane(x, shortcut, planes), **EXACT)


def bend(x, family):
    return reference.sign(x) if family == "projection" else x.clamp(min=0)


def two_convolutions(x, block, family, stride, planes):
    y = bend(normalise(x, block.norm1), family)
    skipped = x if block.shortcut is None else plane_by_plane(y, block.shortcut, planes)
    y = F.conv2d(y, kernels_of(block.conv1), stride=stride, padding=1)
    y = bend(normalise(y, block.norm2), family)
    return F.conv2d(y, kernels_of(block.conv2), padding=1) + skipped


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("stages", "place", "channels", "stride", "shortcut"),
    [
        ([4, 4, 6, 8], 0, 4, 1, False),
        ([4, 5, 6, 8], 0, 4, 1, True),
        ([4, 4, 6, 8], 1, 4, 2, True),
        ([4, 4, 4, 8], 1, 4, 2, True),
    ],
)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("family", ["modulated", "projection", "full"])
def test_a_block_of_two_convolutions_is_its_formula(family, planes, stages, place, channels, stride, shortcut, size):
    block = modules_of(trained("mcn8", stages=stages, planes=planes, family=family), TwoConvBlock)[place]
    x = torch.randn(2, channels * planes, *size, dtype=torch.float64)
    assert (block.shortcut is not None) == shortcut
    torch.testing.assert_close(block(x), two_convolutions(x, block, family, stride, planes), **EXACT)


@torch.no_grad()
def test_mcn8_is_its_blocks_and_a_classifier_of_the_mean_of_their_normalised_maps():
    network = trained("mcn8", family="modulated")
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    y = F.conv2d(x.repeat_interleave(2, dim=1), kernels_of(network.features.stem), padding=1)
    for block, stride in zip(modules_of(network, TwoConvBlock), (1, 2, 2), strict=True):
        y = two_convolutions(y, block, "modulated", stride, 2)
    y = normalise(y, network.features.norm).clamp(min=0).mean(dim=(2, 3))
    expected = y @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(network(x), expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (9, 7), (1, 1)], ids=str)
def test_mcn_small_is_four_pooled_blocks_and_two_linear_layers(size):
    network = trained("mcn_small", family="modulated")
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    y = x.repeat_interleave(2, dim=1)
    for index in range(4):
        stage = network.features.get_submodule(f"stage{index + 1}")
        y = normalise(F.conv2d(y, kernels_of(stage.conv), padding=1), stage.norm).clamp(min=0)
        y = pool_windows(y, torch.amax) if index < 3 else y.amax(dim=(2, 3))
    hidden = (y @ network.features.hidden.weight.T + network.features.hidden.bias).clamp(min=0)
    expected = hidden @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(network(x), expected, **EXACT)


def test_mcn_small_has_the_published_shape():
    network = build("mcn_small", planes=4, in_channels=1, num_classes=7, family="modulated").eval()
    shapes = [(layer.in_channels, layer.out_channels, layer.kernel_size) for layer in one_bit_layers(network)]
    assert shapes == [(4, 80, (3, 3)), (80, 160, (3, 3)), (160, 320, (3, 3)), (320, 640, (3, 3))]
    linear = [(layer.in_features, layer.out_features) for layer in modules_of(network, nn.Linear)]
    assert linear == [(640, 1024), (1024, 7)]
    last = []
    network.features.stage4.pool.register_forward_pre_hook(lambda _, inputs: last.append(tuple(inputs[0].shape[-2:])))
    network(torch.randn(1, 1, 16, 16))
    assert last == [(2, 2)]


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 1), (16, 16), (17, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("name", MCN_BACKBONES)
def test_mcn_takes_images_of_any_size(name, size):
    logits = build(name, stages=SMALL[name], planes=2, family="modulated").eval()(torch.randn(2, 3, *size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


# --- dropout ----------------------------------------------------------------------------------------------------


def before_and_after(dropouts):
    """Records what enters and what leaves each of them."""
    records = []
    for layer in dropouts:
        layer.register_forward_hook(lambda _, inputs, output: records.append((inputs[0].clone(), output.clone())))
    return records


@torch.no_grad()
@pytest.mark.parametrize(("name", "count"), [("mcn8", 3), ("mcn20", 9), ("mcn_small", 1)])
def test_dropout_is_at_work_in_training_only(name, count):
    torch.manual_seed(0)
    network = build(name, stages=SMALL[name], planes=2, family="modulated", dropout=0.25)
    dropouts = modules_of(network, nn.Dropout)
    records, images = before_and_after(dropouts), torch.randn(8, 3, 16, 16)
    assert len(dropouts) == count
    assert not torch.equal(network(images), network(images))
    assert len(records) == 2 * count
    for before, after in records:
        kept = after[before != 0] != 0
        assert kept.double().mean().item() == pytest.approx(0.75, abs=0.05)
        torch.testing.assert_close(after[before != 0][kept], before[before != 0][kept] / 0.75)
    records.clear()
    network.eval()
    assert torch.equal(network(images), network(images))
    assert all(torch.equal(before, after) for before, after in records)


@torch.no_grad()
def test_dropout_of_a_block_is_between_its_convolutions_and_of_mcn_small_before_the_classifier():
    torch.manual_seed(0)
    passed = {}

    def keep(_, inputs, output):
        passed["in"], passed["out"] = inputs[0], output

    block = modules_of(build("mcn8", planes=2, family="modulated", dropout=0.5), TwoConvBlock)[1]
    block.dropout.register_forward_hook(keep)
    second = []
    block.conv2.register_forward_pre_hook(lambda _, inputs: second.append(inputs[0]))
    activated = []
    block.activation2.register_forward_hook(lambda _, __, output: activated.append(output))
    block(torch.randn(2, 32, 6, 6))
    assert passed["in"] is activated[0]
    assert passed["out"] is second[0]

    network = build("mcn_small", planes=2, family="modulated", dropout=0.5)
    modules_of(network, nn.Dropout)[0].register_forward_hook(keep)
    classified = []
    network.classifier.register_forward_pre_hook(lambda _, inputs: classified.append(inputs[0]))
    network.features.relu.register_forward_hook(lambda _, __, output: activated.append(output))
    network(torch.randn(2, 3, 16, 16))
    assert passed["in"] is activated[-1]
    assert passed["out"] is classified[0]


@pytest.mark.parametrize("name", MCN_BACKBONES)
def test_dropout_is_off_by_default(name):
    assert {layer.p for layer in modules_of(build_sizes_only(name), nn.Dropout)} == {0.0}


@pytest.mark.parametrize("name", PCNN_BACKBONES)
def test_dropout_is_refused_for_a_backbone_without_it(name):
    with pytest.raises(ValueError, match=rf"dropout must be 0 for backbone {name}, .* but got 0.5"):
        build_sizes_only(name, dropout=0.5)
    assert modules_of(build_sizes_only(name, dropout=0.0), nn.Dropout) == []


@pytest.mark.parametrize("name", ["mcn8", "mcn_small", "wrn7"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_dropout_is_a_rate_below_one(name, rate):
    with pytest.raises(ValueError, match=rf"dropout must lie in \[0, 1\), but got {rate}"):
        build_sizes_only(name, dropout=rate)


# --- arguments --------------------------------------------------------------------------------------------------


def test_unknown_backbone_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"backbone must be one of .*, but got 'wrn23'") as error:
        build("wrn23")
    assert all(name in str(error.value) for name in BACKBONES)


@pytest.mark.parametrize(
    ("name", "count"),
    [("wrn22", 4), ("resnet18", 5), ("resnet34_cifar", 5), ("vgg_small", 3), ("mcn20", 4), ("mcn_small", 4)],
)
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


@pytest.mark.parametrize(
    ("family", "depth", "allowed"),
    [("wrn22", 23, "3n \\+ 4"), ("resnet18", 50, "18, 34"), ("mcn20", 22, "6n \\+ 2"), ("mcn8", 2, "6n \\+ 2")],
)
def test_wrong_depths_are_refused(family, depth, allowed):
    with pytest.raises(ValueError, match=f"depth must be .*{allowed}.*{depth}"):
        BACKBONES[family](10, 3, *factories("full", 1), depth=depth)
