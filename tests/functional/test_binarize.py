"""``binarize`` against its equations, filter by filter in float64."""

import itertools

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from pcnn_lightning.functional import binarize, normalize_filters

SCALINGS, GRADIENTS, NORMALIZATIONS = (
    ("layer", "channel", "none"),
    ("clip", "identity", "scaled"),
    ("none", "center", "standardize"),
)


def scales(v, scaling):
    magnitudes = [kernel.abs().mean().item() for kernel in v.detach()]
    if scaling == "layer":
        return [sum(magnitudes) / len(magnitudes)] * len(v)
    return magnitudes if scaling == "channel" else [1.0] * len(v)


@given(
    st.integers(0, 10_000),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(2, 3)),
    st.sampled_from(SCALINGS),
    st.sampled_from(GRADIENTS),
    st.sampled_from(NORMALIZATIONS),
)
def test_kernels_and_gradients_are_the_equations(seed, shape, scaling, gradient, normalization):
    torch.manual_seed(seed)
    weight = (1.5 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    delta = torch.randn(shape, dtype=torch.float64)
    kernels = binarize(weight, scaling=scaling, gradient=gradient, normalization=normalization)
    kernels.backward(delta)

    v = reference.normalize(weight, normalization)
    factors = scales(v, scaling)
    expected = torch.stack([scale * reference.sign(kernel) for scale, kernel in zip(factors, v.detach(), strict=True)])
    torch.testing.assert_close(kernels.detach(), expected, rtol=1e-12, atol=1e-12)
    by_v = delta
    if gradient == "scaled":
        by_v = torch.stack([scale * one for scale, one in zip(factors, delta, strict=True)])
    if gradient != "identity":
        by_v = by_v * (v.detach().abs() <= 1)
    (by_weight,) = torch.autograd.grad(v, weight, by_v)  # the chain rule through mean and deviation
    torch.testing.assert_close(weight.grad, by_weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_each_filter_has_two_values_even_where_c_is_zero(scaling):
    weight = torch.randn(4, 3, 3, 3)
    weight[torch.rand_like(weight) < 0.3] = 0
    for kernel in binarize(weight, scaling=scaling):
        low, high = kernel.unique().tolist()
        assert low == -high < 0


@pytest.mark.parametrize(
    ("scaling", "gradient", "normalization"), itertools.product(SCALINGS, GRADIENTS, NORMALIZATIONS)
)
def test_equal_elements_and_nan(scaling, gradient, normalization):
    """A filter of equal elements stays finite; NaN is passed on."""
    options = {"scaling": scaling, "gradient": gradient, "normalization": normalization}
    weight = torch.full((2, 1, 1, 1), 0.5).requires_grad_()
    kernels = binarize(weight, **options)
    kernels.sum().backward()
    assert kernels.isfinite().all()
    assert weight.grad.isfinite().all()
    assert binarize(torch.full((2, 1, 2, 2), torch.nan), **options).isnan().all()


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, -3e-5, 1e4])
@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (1, 16, 3, 3), (1, 64, 1, 1)])
def test_a_standardized_filter_of_equal_elements_is_zero_and_has_no_gradient(shape, value):
    weight = torch.full(shape, value)
    mixed = torch.cat([weight, torch.randn(shape)]).requires_grad_()
    kernels = normalize_filters(mixed)
    kernels.square().sum().backward()
    assert not kernels[0].any()
    assert not mixed.grad[0].any()
    assert kernels[1].isfinite().all()
    assert kernels[1].any()


def test_a_standardized_filter_is_balanced_and_has_the_deviation_of_a_new_one():
    weight = torch.randn(8, 16, 3, 3, dtype=torch.float64) + 3
    assert binarize(weight, scaling="none").mean() > 0.9
    balanced = binarize(weight, scaling="none", normalization="standardize")
    assert balanced.mean(dim=(1, 2, 3)).abs().max() < 0.3
    scale = binarize(weight, normalization="standardize").abs().amax(dim=(1, 2, 3))
    torch.testing.assert_close(scale, torch.full_like(scale, (2 / torch.pi * 2 / (16 * 9)) ** 0.5), rtol=0.1, atol=0)
