"""The sign activation: gradients, compilation, arguments."""

import math

import pytest
import torch

from pcnn_lightning.layers import SignActivation


@pytest.mark.parametrize("gradient", ["clip", "polynomial"])
def test_sign_activation_values_and_gradient(gradient):
    x = torch.tensor([-1.5, -0.25, 0.0, 0.5, 1.0], requires_grad=True)
    signs = SignActivation(gradient)(x)
    signs.sum().backward()
    assert signs.tolist() == [-1, -1, 1, 1, 1]
    assert x.grad.tolist() == {"clip": [0, 1, 1, 1, 1], "polynomial": [0, 1.5, 2, 1, 0]}[gradient]


@pytest.mark.parametrize("gradient", ["clip", "polynomial"])
def test_compiled_sign_activation(gradient):
    torch._dynamo.reset()
    x = torch.tensor([-1.5, -1.0, -0.25, -0.0, 0.0, 0.5, 1.0, math.nan], requires_grad=True)
    signs = torch.compile(SignActivation(gradient), fullgraph=True, backend="aot_eager")(x)
    signs[:-1].sum().backward()
    assert signs[:-1].tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert signs[-1].isnan()
    assert x.grad[:-1].tolist() == {"clip": [0, 1, 1, 1, 1, 1, 1], "polynomial": [0, 0, 1.5, 2, 2, 1, 0]}[gradient]


def test_sign_activation_refuses_an_unknown_gradient():
    with pytest.raises(ValueError, match=r"gradient must be one of clip, polynomial, but got 'steep'"):
        SignActivation("steep")
