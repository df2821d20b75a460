"""Wide ResNets: published sizes and depths."""

import pytest
from backbone_helpers import build_sizes_only, modules_of
from torch import nn

from pcnn_lightning.layers import ProjectionConv2d


@pytest.mark.parametrize(
    ("widths", "planes", "millions"),
    [
        ([16, 16, 32, 64], 1, 0.27),
        ([16, 32, 64, 128], 1, 1.08),
        ([64, 64, 128, 256], 1, 4.32),
        ([16, 16, 32, 64], 4, 1.08),
        ([16, 32, 64, 128], 4, 4.31),
        ([64, 64, 128, 256], 4, 17.29),
    ],
)
def test_wrn22_has_the_published_number_of_learned_parameters(widths, planes, millions):
    network = build_sizes_only("wrn22", widths=widths, planes=planes)
    learned = sum(module.weight.numel() for module in modules_of(network, (nn.Conv2d, nn.Linear, ProjectionConv2d)))
    assert round(learned / 1e6, 2) == millions


def test_depth_counts_stem_shortcuts_and_classifier():
    for depth in (22, 40):
        network = build_sizes_only(f"wrn{depth}")
        assert len(modules_of(network, (nn.Conv2d, nn.Linear, ProjectionConv2d))) == depth
