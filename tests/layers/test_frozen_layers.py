"""Frozen layers against the equations and the trained layers that they are made from."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from projection_layers import LEVELS
from torch import nn

from pcnn_lightning.deploy import freeze
from pcnn_lightning.layers import (
    FrozenBatchNorm2d,
    FrozenConv2d,
    FrozenModulatedConv2d,
    ModulatedConv2d,
    ProjectionConv2d,
)

SHAPES = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "dilation": 2},
    {"kernel_size": 3, "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 2, "padding": "valid"},
    {"kernel_size": 1},
]


def with_zeros(layer):
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.2] = 0.0
    return layer


@pytest.mark.parametrize("stage", ["binary", "ternary"])
@pytest.mark.parametrize("projections", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_signs_and_scale_of_a_projection_layer(shape, projections, stage):
    torch.manual_seed(0)
    layer = with_zeros(ProjectionConv2d(5, 6, **shape, projections=projections, stage=stage))
    frozen = freeze(layer)
    expected = reference.quantize(
        layer.weight, layer.projection, levels=LEVELS[stage], projection_forward=layer.projection_forward
    )
    scale = layer.weight.abs().mean() * (1 if stage == "binary" else 0.7)
    torch.testing.assert_close(frozen.scale, scale)
    assert frozen.scale.shape == ()
    assert torch.equal(frozen.signs.double(), (expected / scale.double()).round())
    assert frozen.signs.dtype == torch.int8
    assert frozen.signs.unique().tolist() == list(frozen.symbols) == ([-1, 1] if stage == "binary" else [-1, 0, 1])
    assert torch.equal(frozen.quantized_weight(), layer.quantized_weight())
    x = torch.randn(2, 5, 7, 8)
    assert torch.equal(frozen(x), layer.eval()(x))
    torch.testing.assert_close(frozen(x), layer.train()(x))


@pytest.mark.parametrize("stage", ["binary", "ternary"])
def test_zero_kernels(stage):
    layer = ProjectionConv2d(2, 4, 3, stage=stage)
    nn.init.zeros_(layer.weight)
    frozen = freeze(layer)
    assert frozen.scale == 0
    assert set(frozen.signs.unique().tolist()) <= set(frozen.symbols)
    assert torch.equal(frozen(torch.ones(1, 2, 3, 3)), torch.zeros(1, 4, 1, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"average": True},
        {"scale": 0.3},
        {"levels": 3},
        {"levels": 4, "average": True},
        {"binarize": False},
        {"binarize": False, "average": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_signs_and_planes_of_a_modulated_layer(shape, options):
    torch.manual_seed(0)
    layer = with_zeros(ModulatedConv2d(5, 6, **shape, planes=2, **options))
    assert (layer.modulation < 0).any()
    frozen = freeze(layer)
    average, binarize, levels = options.get("average", False), options.get("binarize", True), options.get("levels", 2)
    quantized = reference.quantize_by_levels(
        layer.weight, scale=options.get("scale"), centers=layer.centers, binarize=binarize
    )
    torch.testing.assert_close(frozen.quantized_kernels(), quantized.float())
    planes = reference.modulating_planes(layer.modulation, average)
    torch.testing.assert_close(frozen.modulation.expand(2, *layer.kernel_size), torch.stack(planes).float())
    assert frozen.modulation.shape == ((2, 1, 1) if average else layer.modulation.shape)
    held = {name for name, buffer in frozen.named_buffers() if buffer is not None}
    if not binarize:
        assert held == {"kernels", "modulation"}
    elif levels == 2:
        assert held == {"signs", "scale", "modulation"}
        assert frozen.signs.unique().tolist() == list(frozen.symbols) == [-1, 1]
    else:
        assert held == {"codes", "values", "modulation"}
        assert frozen.codes.unique().tolist() == list(frozen.symbols) == list(range(levels))
        assert torch.equal(frozen.values, layer.centers)
    assert torch.equal(frozen.quantized_weight(), layer.quantized_weight())
    x = torch.randn(2, 5, 9, 8)
    assert torch.equal(frozen(x), layer(x))


def test_equal_centers():
    layer = ModulatedConv2d(2, 4, 3, levels=4)
    layer.weight.data = layer.weight.sign()  # two values for four centres
    layer.refresh_centers()
    frozen = freeze(layer)
    assert torch.equal(frozen.quantized_weight(), layer.quantized_weight())
    assert frozen.codes.max() < 4


def test_a_batch_norm_is_a_scale_and_a_shift():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(40).eval()
    for values in (norm.weight.data, norm.bias.data, norm.running_mean):
        values.normal_()
    norm.running_var.uniform_(0, 3)
    norm.weight.data[0], norm.running_var[1] = 0, 0
    frozen = freeze(norm)
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    torch.testing.assert_close(frozen.scale.double(), norm.weight.double() / deviation, rtol=1e-6, atol=0)
    x = torch.randn(3, 40, 7, 5)
    centred = (x.double() - norm.running_mean[:, None, None]) / deviation[:, None, None]
    expected = centred * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    torch.testing.assert_close(frozen(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frozen(x), norm(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(frozen(x)[:, 0], norm.bias[0].expand(3, 7, 5))


def test_a_batch_norm_without_factors():
    norm = nn.BatchNorm2d(3, affine=False).eval()
    norm.running_mean.normal_()
    x = torch.randn(2, 3, 4, 4)
    frozen = freeze(norm)
    assert isinstance(frozen, FrozenBatchNorm2d)
    torch.testing.assert_close(frozen(x), norm(x))


def test_a_batch_norm_without_statistics_is_refused():
    with pytest.raises(ValueError, match="track_running_stats"):
        freeze(nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize(
    "layer",
    [
        ProjectionConv2d(2, 2, 3),
        ProjectionConv2d(2, 2, 3, stage="ternary"),
        ModulatedConv2d(2, 4, 3),
        ModulatedConv2d(2, 4, 3, scale=0.1),
        ModulatedConv2d(2, 4, 3, levels=3),
        ModulatedConv2d(2, 4, 3, binarize=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("parameter", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_parameters_are_refused(layer, parameter, value):
    """Signs alone would hide NaN and infinity."""
    broken = copy.deepcopy(layer)
    list(broken.parameters())[parameter].data.view(-1)[3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        freeze(broken)


def test_arguments_of_frozen_layers():
    with pytest.raises(ValueError, match="levels must be 2, 3, 4 or None, but got 5"):
        FrozenModulatedConv2d(2, 4, 3, levels=5)
    with pytest.raises(ValueError, match="levels must be 2 or 3, but got 4"):
        FrozenConv2d(2, 4, 3, levels=4)
    with pytest.raises(ValueError, match="scaling must be one of layer, channel, none, but got 'filter'"):
        FrozenConv2d(2, 4, 3, scaling="filter")
    with pytest.raises(ValueError, match="average must be true or false, but got 1"):
        FrozenModulatedConv2d(2, 4, 3, average=1)
    layer = FrozenConv2d(2, 4, (3, 5), stride=2, padding=1)
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 5), (2, 2), (1, 1), (1, 1))
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(layer(x), F.conv2d(x, torch.ones(4, 2, 3, 5), None, 2, 1))
