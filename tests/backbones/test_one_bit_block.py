"""The blocks of wide ResNets and ResNets against their equations."""

import pytest
import reference
import torch
import torch.nn.functional as F
from backbone_helpers import blocks_of, convolution_branch, modules_of, normalise, pool_windows, prelu
from reference import EXACT
from torch import nn


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
    block = blocks_of("wrn7", widths=[4, 6, 8, 8])[0]
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = prelu(convolution_branch(x, block, 1) + projected_shortcut(x, block, 2), block)
    torch.testing.assert_close(block(x), expected, **EXACT)
    assert modules_of(block, (nn.AvgPool2d, nn.MaxPool2d)) == []


@torch.no_grad()
def test_a_block_with_thresholds_and_two_slopes():
    block = blocks_of("wrn7", activation_threshold=True, two_slopes=True)[0]
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    threshold, positive, negative = (
        values.reshape(-1, 1, 1) for values in (block.activation.threshold, block.prelu.positive, block.prelu.negative)
    )
    quantized = reference.quantize(block.conv.weight, block.conv.projection)
    y = F.conv2d(reference.sign(normalise(x, block.norm) - threshold), quantized, padding=1) + x
    torch.testing.assert_close(block(x), torch.where(y > 0, positive * y, negative * y), **EXACT)


@pytest.mark.parametrize("name", ["resnet18_cifar", "vgg_small"])
def test_every_block_takes_the_options(name):
    for block in blocks_of(name, activation_threshold=True, two_slopes=True):
        assert block.activation.threshold.shape == (block.conv.in_channels,)
        assert block.activation.name.startswith("stage")
        assert block.prelu.positive.shape == (block.conv.out_channels,)
    assert all(type(block.prelu) is nn.PReLU and block.activation.threshold is None for block in blocks_of(name))


def test_wrong_options_of_blocks_raise():
    with pytest.raises(ValueError, match="two_slopes must be true or false, but got 1"):
        blocks_of("wrn7", two_slopes=1)
    with pytest.raises(ValueError, match="block must be one of activation_threshold, two_slopes, but got 'slopes'"):
        blocks_of("wrn7", slopes=True)
    with pytest.raises(ValueError, match="two_slopes must be false for backbone mcn8, which has no blocks with option"):
        blocks_of("mcn8", two_slopes=True)
