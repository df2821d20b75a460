"""A projection layer, its inputs and the gradients that it should leave."""

import itertools

import pytest
import reference
import torch
from reference import EXACT

from pcnn_lightning.layers import ProjectionConv2d

LAMBDA, ETA = 0.3, 0.5  # large, so that every term of the gradients matters
CONVOLUTION = {"stride": 2, "padding": 1}
IN, OUT, BATCH = 3, 8, 4
LEVELS = {"binary": 2, "ternary": 3}
every_kind = pytest.mark.parametrize(
    ("projections", "stage", "forward"), list(itertools.product([1, 4], ["binary", "ternary"], ["full", "mean"]))
)


def make_layer(seed=0, dtype=torch.float64, **arguments):
    """A layer whose |W̃ ∘ C| lies on both sides of 1, with W of both signs."""
    torch.manual_seed(seed)
    defaults = {"projection_loss_weight": LAMBDA, "projections": 4, **CONVOLUTION}
    layer = ProjectionConv2d(IN, OUT, 3, **{**defaults, **arguments}).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(2 * torch.randn_like(layer.weight))
        layer.projection.copy_(torch.randn_like(layer.projection))
    inside = (layer.weight.detach().unsqueeze(1) * layer.projection.detach()[:, None]).abs() <= 1
    assert 0.1 < inside.double().mean() < 0.9
    return layer


def draw_batch(seed=1, dtype=torch.float64, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, IN, 7, 6, dtype=torch.float64, generator=generator)
    target = torch.randn(batch, OUT, 4, 3, dtype=torch.float64, generator=generator)
    return x.to(dtype), target.to(dtype)


def task_loss(y, target):
    """A mean over the batch, not linear in y. The factor makes η·δ as large as C."""
    return 10 * (y - target).square().mean()


def reference_gradients(layer, x, target, scale=1.0, eta=None):
    """The gradients of one step on the whole batch, from the equations."""
    weight, projection = layer.weight.detach().double(), layer.projection.detach().double()
    quantized = reference.quantize(
        weight, projection, levels=layer.levels, sigma=layer.sigma, projection_forward=layer.projection_forward
    )
    delta = reference.task_gradient(lambda y: task_loss(y, target.double()), x, quantized, **CONVOLUTION)
    by_weight, by_projection = reference.gradients(
        weight,
        projection,
        quantized,
        delta,
        loss_weight=layer.projection_loss_weight,
        eta=layer.eta if eta is None else eta,
    )
    return scale * by_weight, scale * by_projection


def assert_gradients(layer, expected, **tolerance):
    for parameter, formula in zip((layer.weight, layer.projection), expected, strict=True):
        torch.testing.assert_close(parameter.grad.double(), formula, **(tolerance or EXACT))


def update(layer, rate=0.01):
    """Take a plain gradient step and clear the gradients."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= rate * parameter.grad
            parameter.grad = None
