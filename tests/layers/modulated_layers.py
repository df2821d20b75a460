"""A modulated layer, its inputs and the gradients that it should leave."""

import itertools

import pytest
import reference
import torch
from reference import EXACT

from pcnn_lightning.layers import ModulatedConv2d

THETA = 0.3  # large, so that every term of the gradients matters
STRIDED = {"stride": 2, "padding": 1}
CONVOLUTIONS = [
    {},
    STRIDED,
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
]
IN, OUT, BATCH = 3, 8, 4
KINDS = {
    "mean": {},
    "constant": {"scale": 0.4},
    "three": {"levels": 3},
    "four": {"levels": 4},
    "unbinarised": {"binarize": False},
}
every_kind = pytest.mark.parametrize(
    ("kind", "planes", "average"), list(itertools.product(KINDS, [1, 4], [False, True]))
)


def make_layer(kind="mean", seed=0, dtype=torch.float64, kernel_size=3, **arguments):
    """A layer whose M has both signs and whose centres are those of its C."""
    torch.manual_seed(seed)
    defaults = {"filter_loss_weight": THETA, "planes": 4, **STRIDED, **KINDS[kind]}
    layer = ModulatedConv2d(IN, OUT, kernel_size, **{**defaults, **arguments}).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
        layer.modulation.copy_(torch.randn_like(layer.modulation))
        layer.modulation[0, 0, 0] = -layer.modulation[0, 0, 0].abs()
        layer.modulation[-1, -1, -1] = layer.modulation[-1, -1, -1].abs() if layer.modulation.numel() > 1 else -0.5
    layer.refresh_centers()
    return layer


def draw_batch(seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, IN, 9, 8, dtype=torch.float64, generator=generator).to(dtype)


def task_loss(y):
    """Not linear in y, so that δ depends on Q."""
    return (y - 0.3).square().mean() + y.sin().mean()


def reference_quantized(layer):
    return reference.quantize_by_levels(layer.weight, scale=layer.scale, centers=layer.centers, binarize=layer.binarize)


def reference_kernels(layer):
    return reference.modulate(reference_quantized(layer), layer.modulation, layer.average)


def convolution_of(layer):
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def reference_gradients(layer, x=None, loss_weight=None):
    """The gradients of a backward pass; without ``x``, those of the filter loss alone."""
    kernels = reference_kernels(layer)
    delta = (
        torch.zeros_like(kernels)
        if x is None
        else reference.task_gradient(task_loss, x, kernels, **convolution_of(layer))
    )
    return reference.modulation_gradients(
        layer.weight,
        layer.modulation,
        reference_quantized(layer),
        delta,
        loss_weight=layer.filter_loss_weight if loss_weight is None else loss_weight,
        average=layer.average,
    )


def reference_loss(layer):
    return reference.filter_loss(
        layer.weight, layer.modulation, reference_quantized(layer), layer.filter_loss_weight, layer.average
    )


def assert_gradients(layer, expected, **tolerance):
    for parameter, formula in zip((layer.weight, layer.modulation), expected, strict=True):
        torch.testing.assert_close(parameter.grad.double(), formula, **(tolerance or EXACT))
