"""Wrong numbers for the arguments of layers and loss terms are refused by name."""

import inspect
import math

import pytest

from pcnn_lightning.layers import BinaryConv2d, ModulatedConv2d, ProjectionConv2d, TwoSlopePReLU
from pcnn_lightning.losses import CenterLoss, CrossEntropy, Distillation

SHAPE = {"in_channels": 4, "out_channels": 8, "kernel_size": 3}
PAIRS = {"kernel_size", "stride", "padding", "dilation"}
COMMON = {"in_channels", "out_channels", "groups"} | PAIRS
NUMBERS = {
    BinaryConv2d: COMMON,
    ProjectionConv2d: COMMON | {"projections", "sigma", "projection_loss_weight", "eta"},
    ModulatedConv2d: COMMON | {"planes", "levels", "filter_loss_weight", "scale"},
    TwoSlopePReLU: {"channels"},
    CenterLoss: {"num_classes", "feature_dim", "weight", "alpha", "start"},
    CrossEntropy: {"label_smoothing", "weight"},
    Distillation: {"weight", "temperature", "start"},
}
GIVEN = {CenterLoss: {"num_classes": 3, "feature_dim": 2, "weight": 0.1}, CrossEntropy: {}}
GIVEN |= {TwoSlopePReLU: {}, Distillation: {}}
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "0.5"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_the_table_has_every_number(kind):
    """All that is left are choices of strings, yes or no, and lists."""
    others = set(inspect.signature(kind.__init__).parameters) - NUMBERS[kind] - {"self"}
    assert all(
        name.endswith(
            ("stage", "forward", "init", "scaling", "gradient", "zation", "average", "binarize", "bias", "weights")
        )
        for name in others
    )


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NUMBERS.items() for name in sorted(names)])
def test_what_is_no_number_is_refused_by_name(kind, name):
    strings = {"start"}  # a string names a stage
    for value in NO_NUMBERS[:-1] if name in strings else NO_NUMBERS:
        for given in (value, (1, value)) if name in PAIRS else (value,):
            with pytest.raises(ValueError, match=rf"^{name} must be .*{value!r}"):
                kind(**{**GIVEN.get(kind, SHAPE), name: given})
