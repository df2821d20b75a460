"""The backbones of MCN: sizes, repeated channels, plane shortcuts, blocks and dropout."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from backbone_helpers import (
    MCN_BACKBONES,
    ONE_BIT_CONVOLUTIONS,
    SMALL,
    build,
    build_sizes_only,
    factories,
    inputs_of_one_bit_layers,
    modules_of,
    normalise,
    one_bit_layers,
    pool_windows,
    trained,
)
from reference import EXACT
from torch import nn

from pcnn_lightning.backbones.mcn import PlaneConv, RepeatChannels, TwoConvBlock
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d

# --- structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "millions"),
    [
        ([16, 16, 32, 64], 1.08),
        ([16, 32, 64, 128], 4.28),
        ([32, 64, 128, 256], 17.09),
        ([64, 64, 128, 256], 17.16),
    ],
)
def test_mcn20_has_the_published_number_of_learned_parameters(widths, millions):
    network = build_sizes_only("mcn20", widths=widths, planes=4, family="modulated")
    learned = sum(layer.weight.numel() + layer.modulation.numel() for layer in one_bit_layers(network))
    learned += sum(parameter.numel() for parameter in network.classifier.parameters())
    assert round(learned / 1e6, 2) == millions
    norms = sum(parameter.numel() for norm in modules_of(network, nn.BatchNorm2d) for parameter in norm.parameters())
    assert learned + norms == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("family", ["modulated", "projection"])
@pytest.mark.parametrize("name", MCN_BACKBONES)
def test_all_convolutions_of_mcn_are_one_bit(name, family):
    network = build(name, widths=SMALL[name], planes=2, family=family)
    first, *others = one_bit_layers(network)
    assert modules_of(network, nn.Conv2d) == []
    assert (first.in_channels, first.out_channels, first.kernel_size) == (6, 8, (3, 3))
    assert len(others) + 1 == ONE_BIT_CONVOLUTIONS[name]
    assert len(modules_of(network, nn.Linear)) == (2 if name == "mcn_small" else 1)


@pytest.mark.parametrize("depth", [8, 20])
def test_depth_of_mcn_counts_stem_and_classifier_but_no_shortcuts(depth):
    network = build_sizes_only(f"mcn{depth}", family="modulated")
    assert sum(layer.kernel_size == (3, 3) for layer in one_bit_layers(network)) + 1 == depth
    blocks = [len(network.features.get_submodule(f"stage{index}")) for index in (1, 2, 3)]
    assert blocks == [(depth - 2) // 6] * 3


@pytest.mark.parametrize(
    ("widths", "maps"),
    [
        ([4, 4, 6, 8], [(4, 6), (6, 8)]),
        ([4, 4, 4, 4], [(4, 4), (4, 4)]),
        ([4, 5, 6, 8], [(4, 5), (5, 6), (6, 8)]),
    ],
)
def test_shortcuts_of_mcn_are_from_map_to_map_where_the_shape_changes(widths, maps):
    network = build("mcn8", widths=widths, planes=4, family="modulated")
    shortcuts = [layer for layer in one_bit_layers(network) if layer.kernel_size == (1, 1)]
    assert [(layer.in_channels, layer.out_channels) for layer in shortcuts] == maps
    assert [layer.weight.numel() for layer in shortcuts] == [before * after for before, after in maps]
    assert {layer.planes for layer in shortcuts} == {1}
    assert {layer.planes for layer in one_bit_layers(network) if layer.kernel_size == (3, 3)} == {4}


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


@pytest.mark.parametrize("name", MCN_BACKBONES)
def test_modulated_convolutions_see_the_images_or_the_output_of_a_relu(name):
    torch.manual_seed(0)
    network = build(name, widths=SMALL[name], planes=2, family="modulated")
    images = torch.randn(2, 3, 32, 32)
    first, *others = inputs_of_one_bit_layers(network, images)
    assert torch.equal(first, images.repeat_interleave(2, dim=1))
    assert len(others) == ONE_BIT_CONVOLUTIONS[name] - 1
    assert all(values.min() == 0 for values in others)
    assert all(len(values.unique()) > 100 for values in others)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 1), (16, 16), (17, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("name", MCN_BACKBONES)
def test_mcn_takes_images_of_any_size(name, size):
    logits = build(name, widths=SMALL[name], planes=2, family="modulated").eval()(torch.randn(2, 3, *size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


# --- parts against their equations ----------------------------------------------------------------------------------


def test_channels_are_repeated_side_by_side():
    x = torch.randn(2, 3, 5, 4)
    repeated = RepeatChannels(4)(x)
    order = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]  # R, R, R, R, G, ...
    assert repeated.shape == (2, 12, 5, 4)
    assert all(torch.equal(repeated[:, place], x[:, channel]) for place, channel in enumerate(order))


def kernels_of(layer):
    """The kernels of a layer from the equations; those of an ordinary convolution are its weight."""
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
def test_plane_shortcut_is_its_formula(family, planes, stride, size):
    torch.manual_seed(0)
    shortcut = PlaneConv(3 * planes, 5 * planes, factories(family, planes)[0], stride, planes).double()
    assert sum(parameter.numel() for parameter in shortcut.parameters()) == 3 * 5 + (family != "full")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3 * planes, *size, dtype=torch.float64).to(memory_format=memory_format)
        y = shortcut(x)
        assert y.shape == (2, 5 * planes, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        torch.testing.assert_close(y, plane_by_plane(x, shortcut, planes), **EXACT)


def activate(x, family):
    return reference.sign(x) if family == "projection" else x.clamp(min=0)


def two_convolutions(x, block, family, stride, planes):
    y = activate(normalise(x, block.norm1), family)
    skipped = x if block.shortcut is None else plane_by_plane(y, block.shortcut, planes)
    y = F.conv2d(y, kernels_of(block.conv1), stride=stride, padding=1)
    y = activate(normalise(y, block.norm2), family)
    return F.conv2d(y, kernels_of(block.conv2), padding=1) + skipped


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("widths", "place", "channels", "stride", "shortcut"),
    [
        ([4, 4, 6, 8], 0, 4, 1, False),
        ([4, 5, 6, 8], 0, 4, 1, True),
        ([4, 4, 6, 8], 1, 4, 2, True),
        ([4, 4, 4, 8], 1, 4, 2, True),
    ],
)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("family", ["modulated", "projection", "full"])
def test_a_block_of_two_convolutions_is_its_formula(family, planes, widths, place, channels, stride, shortcut, size):
    block = modules_of(trained("mcn8", widths=widths, planes=planes, family=family), TwoConvBlock)[place]
    x = torch.randn(2, channels * planes, *size, dtype=torch.float64)
    assert (block.shortcut is not None) == shortcut
    torch.testing.assert_close(block(x), two_convolutions(x, block, family, stride, planes), **EXACT)


@torch.no_grad()
def test_mcn8_is_its_formula():
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
def test_mcn_small_is_its_formula(size):
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


# --- dropout --------------------------------------------------------------------------------------------------------


def before_and_after(dropouts):
    """Record the inputs and outputs of each dropout layer."""
    records = []
    for layer in dropouts:
        layer.register_forward_hook(lambda _, inputs, output: records.append((inputs[0].clone(), output.clone())))
    return records


@torch.no_grad()
@pytest.mark.parametrize(("name", "count"), [("mcn8", 3), ("mcn20", 9), ("mcn_small", 1)])
def test_dropout_is_active_in_training_only(name, count):
    torch.manual_seed(0)
    network = build(name, widths=SMALL[name], planes=2, family="modulated", dropout=0.25)
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
def test_place_of_dropout():
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
