"""ResNets: published sizes."""

import pytest
from backbone_helpers import build_sizes_only, one_bit_layers


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
