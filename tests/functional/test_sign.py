"""Values and gradients of ``sign`` and ``sign_activation``."""

import math

import pytest
import torch

from pcnn_lightning.functional import sign, sign_activation

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("binarise", [sign, sign_activation, lambda x: sign_activation(x, "polynomial")])
def test_sign_has_two_values_and_both_zeros_are_plus_one(binarise, dtype):
    x = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 3.0, -3.0, math.inf, -math.inf], dtype=dtype)
    signs = binarise(x)
    assert signs.tolist() == [1, 1, 1, -1, 1, -1, 1, -1]
    assert signs.dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("binarise", [sign, sign_activation])
def test_sign_passes_nan_on(binarise, dtype):
    signs = binarise(torch.tensor([math.nan, 2.0, -2.0], dtype=dtype))
    assert signs.isnan().tolist() == [True, False, False]
    assert signs[1:].tolist() == [1, -1]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        # x:        -2  -1    -0.75 -0.5 -0.0  0  0.25  0.5  1  1.25
        ("clip", [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]),
        ("polynomial", [0, 0, 0.5, 1, 2, 2, 1.5, 1, 0, 0]),
    ],
)
def test_sign_gradient_is_the_closed_form(gradient, expected, dtype):
    x = torch.tensor([-2, -1, -0.75, -0.5, -0.0, 0, 0.25, 0.5, 1, 1.25], dtype=dtype, requires_grad=True)
    upstream = torch.tensor([1, -2, 4, 8, -1, 2, 4, -8, 1, 2], dtype=dtype)
    sign_activation(x, gradient).backward(upstream)
    assert x.grad.dtype == dtype
    assert x.grad.tolist() == [slope * up for slope, up in zip(expected, upstream.tolist(), strict=True)]


def test_clip_ends_right_after_one():
    just_outside = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    x = torch.stack([just_outside, -just_outside]).requires_grad_()
    sign_activation(x).sum().backward()
    assert x.grad.tolist() == [0, 0]


def test_clip_is_the_default_gradient():
    x = torch.tensor([0.25], requires_grad=True)
    sign_activation(x).sum().backward()
    assert x.grad.item() == 1
