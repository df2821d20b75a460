"""``TwoSlopePReLU`` against its equation, number by number in float64."""

import pytest
import torch
from reference import EXACT
from torch import nn

from pcnn_lightning.layers import TwoSlopePReLU


def slopes_of(positive, negative):
    layer = TwoSlopePReLU(len(positive)).double()
    layer.positive.data.copy_(torch.tensor(positive))
    layer.negative.data.copy_(torch.tensor(negative))
    return layer


@pytest.mark.parametrize("call", [lambda layer: layer, lambda layer: torch.compile(layer, fullgraph=True)])
def test_values_and_gradients_are_the_equation(call):
    torch.manual_seed(0)
    layer = slopes_of([2.0, -0.5, 0.0], [-3.0, 0.25, 0.0])
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x[0, :, 0, 0] = 0
    x.requires_grad_()
    delta = torch.randn_like(x)
    y = call(layer)(x)
    y.backward(delta)

    value, by_x = torch.zeros_like(x), torch.zeros_like(x)
    by_positive, by_negative = [0.0] * 3, [0.0] * 3
    for place in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        number, weight, channel = x[tuple(place)].item(), delta[tuple(place)].item(), place[1]
        above = number > 0
        slope = (layer.positive if above else layer.negative)[channel].item()
        value[tuple(place)], by_x[tuple(place)] = slope * number, slope * weight
        (by_positive if above else by_negative)[channel] += weight * number
    torch.testing.assert_close(y.detach(), value.detach(), **EXACT)
    torch.testing.assert_close(x.grad, by_x.detach(), **EXACT)
    torch.testing.assert_close(layer.positive.grad, torch.tensor(by_positive, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(layer.negative.grad, torch.tensor(by_negative, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_first_it_is_torchs_prelu_bit_for_bit(dtype):
    torch.manual_seed(0)
    ours, theirs = TwoSlopePReLU(3).to(dtype), nn.PReLU(3, dtype=dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(one) for layer, one in zip((ours, theirs), inputs, strict=True)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.backward(x.flip(-1).nan_to_num(posinf=1, neginf=1))
    assert torch.equal(*[one.grad for one in inputs])
    assert ours(torch.full((1, 3, 1, 1), torch.nan, dtype=dtype)).isnan().all()


def test_activations_keep_their_dtype_under_autocast():
    x = torch.randn(1, 2, 3, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert TwoSlopePReLU(2)(x).dtype == torch.bfloat16
