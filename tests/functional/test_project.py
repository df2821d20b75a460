"""``project`` and ``eta_square`` against the equations in ``reference.py``."""

import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from properties import few_examples, seeds, sizes
from reference import EXACT

from pcnn_lightning.functional import eta_square, project

levels_of_a_layer = st.sampled_from([2, 3])
forwards = st.sampled_from(["full", "mean"])


def draw_parameters(seed: int, originals: int, in_channels: int, projections: int, kernel: tuple[int, int]):
    generator = torch.Generator().manual_seed(seed)
    weight = 1.5 * torch.randn(originals, in_channels, *kernel, dtype=torch.float64, generator=generator)
    projection = torch.randn(projections, *kernel, dtype=torch.float64, generator=generator)
    return weight, projection, generator


# --- values ---------------------------------------------------------------------------------------------------------


@few_examples
@given(seeds, sizes, sizes, st.integers(1, 4), st.tuples(sizes, sizes), levels_of_a_layer, forwards)
def test_quantised_kernels_and_loss_are_the_equations(seed, originals, in_channels, projections, kernel, levels, fwd):
    weight, projection, _ = draw_parameters(seed, originals, in_channels, projections, kernel)
    quantized, loss = project(
        weight, projection, levels=levels, sigma=0.6, loss_weight=0.3, eta=0.5, projection_forward=fwd
    )
    expected = reference.quantize(weight, projection, levels=levels, sigma=0.6, projection_forward=fwd)
    assert quantized.shape == (originals * projections, in_channels, *kernel)
    torch.testing.assert_close(quantized, expected, **EXACT)
    # The value of the loss has η = 0: δ is unknown before the backward pass.
    assert loss.item() == pytest.approx(reference.projection_loss(weight, projection, expected, 0.3), rel=1e-9)


def test_kernel_o_through_projection_j_is_output_channel_o_times_count_plus_j():
    weight = torch.tensor([1.0, -1.0, 1.0]).reshape(3, 1, 1, 1)
    projection = torch.tensor([1.0, -1.0]).reshape(2, 1, 1)
    quantized, _ = project(weight, projection)
    assert quantized.flatten().tolist() == [1, -1, -1, 1, 1, -1]


def explicit_convolution(x, kernels, projections, stride, padding, dilation):
    """F_out^{o,j} = Σ_i F_in^i ∗ Ĉ_{o,j}^i (3.47), every sum a loop; ``kernels[o][j]`` is (in, kh, kw)."""
    batch, in_channels, height, width = x.shape
    kernel_height, kernel_width = kernels[0][0].shape[-2:]
    out_height = (height + 2 * padding[0] - dilation[0] * (kernel_height - 1) - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - dilation[1] * (kernel_width - 1) - 1) // stride[1] + 1
    result = torch.zeros(batch, len(kernels) * projections, out_height, out_width, dtype=torch.float64)
    pixels = x.tolist()
    for o, j in itertools.product(range(len(kernels)), range(projections)):
        kernel = kernels[o][j].tolist()
        for b, row, column in itertools.product(range(batch), range(out_height), range(out_width)):
            total = 0.0
            for i, u, v in itertools.product(range(in_channels), range(kernel_height), range(kernel_width)):
                source_row = row * stride[0] - padding[0] + u * dilation[0]
                source_column = column * stride[1] - padding[1] + v * dilation[1]
                if 0 <= source_row < height and 0 <= source_column < width:
                    total += pixels[b][i][source_row][source_column] * kernel[i][u][v]
            result[b, o * projections + j, row, column] = total
    return result


@few_examples
@given(
    seeds,
    st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 3), (3, 2)]),
    st.tuples(sizes, sizes, st.sampled_from([1, 2, 4])),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 1)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    levels_of_a_layer,
)
def test_convolution_with_d_is_the_sum_over_input_channels(seed, kernel, channels, stride, padding, dilation, levels):
    originals, in_channels, projections = channels
    weight, projection, generator = draw_parameters(seed, originals, in_channels, projections, kernel)
    x = reference.sign(torch.randn(2, in_channels, 5, 6, dtype=torch.float64, generator=generator))
    quantized, _ = project(weight, projection, levels=levels)

    kernels = [
        [
            reference.quantize(weight, projection[j : j + 1], levels=levels)[o]  # mean|C| is the whole layer's
            for j in range(projections)
        ]
        for o in range(originals)
    ]
    expected = explicit_convolution(x, kernels, projections, stride, padding, dilation)
    torch.testing.assert_close(F.conv2d(x, quantized, None, stride, padding, dilation), expected, **EXACT)


def test_binary_kernels_hold_two_values_even_where_c_is_zero():
    weight, projection, _ = draw_parameters(0, 4, 3, 4, (3, 3))
    weight[::2, 1] = 0.0
    weight[1, 0] = -0.0
    quantized, _ = project(weight, projection)
    scale = weight.abs().mean().item()
    assert sorted(quantized.unique().tolist()) == pytest.approx([-scale, scale])
    zero = (weight == 0).repeat_interleave(4, dim=0)
    assert zero.any()
    assert (quantized[zero] > 0).all()


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.1])
def test_ternary_kernels_hold_three_values_and_are_zero_up_to_the_threshold(sigma):
    weight, projection, _ = draw_parameters(1, 4, 3, 4, (3, 3))
    quantized, _ = project(weight, projection, levels=3, sigma=sigma)
    threshold = sigma * weight.abs().mean().item()
    assert sorted(quantized.unique().tolist()) == pytest.approx([-threshold, 0, threshold])
    for o, j in itertools.product(range(4), range(4)):
        small = (projection[j] * weight[o]).abs() <= threshold
        assert torch.equal(quantized[o * 4 + j] == 0, small)


def test_ternary_is_zero_on_the_threshold_itself():
    # mean|C| = 2 and σ = 1/2 make Δ = 1 exactly.
    weight = torch.tensor([1.0, -1.0, 3.0, -3.0]).reshape(1, 4, 1, 1)
    quantized, _ = project(weight, torch.ones(1, 1, 1), levels=3, sigma=0.5)
    assert quantized.flatten().tolist() == [0, 0, 1, -1]


def test_a_gaussian_ternary_layer_is_42_percent_zeros():
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    quantized, _ = project(weight, torch.ones(1, 3, 3), levels=3, sigma=0.7)
    # P(|z| ≤ 0.7 · E|z|) with E|z| = sqrt(2/π)
    expected = math.erf(0.7 * math.sqrt(2 / math.pi) / math.sqrt(2))
    assert expected == pytest.approx(0.42, abs=0.005)
    assert (quantized == 0).double().mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("forward", ["full", "mean"])
def test_one_projection_of_ones_is_a_binary_weight_convolution(forward):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 3, 3, 3, generator=generator), torch.randn(2, 3, 6, 6, generator=generator)
    quantized, _ = project(weight, torch.ones(1, 3, 3), projection_forward=forward)
    expected = weight.abs().mean() * F.conv2d(x, weight.sign(), padding=1)
    torch.testing.assert_close(F.conv2d(x, quantized, padding=1), expected)


def test_with_the_mean_the_kernels_of_a_binary_layer_are_equal_up_to_sign():
    weight, projection, _ = draw_parameters(2, 3, 2, 4, (3, 3))
    projection[0] -= projection[0].mean() + 1  # at least one of each sign
    projection[1] -= projection[1].mean() - 1
    mean, _ = project(weight, projection, projection_forward="mean")
    full, _ = project(weight, projection, projection_forward="full")
    for o, j in itertools.product(range(3), range(1, 4)):
        same_side = projection[j].mean().sign() == projection[0].mean().sign()
        assert torch.equal(mean[o * 4 + j], mean[o * 4] if same_side else -mean[o * 4])
        assert not torch.equal(full[o * 4 + j], full[o * 4])
        assert not torch.equal(full[o * 4 + j], -full[o * 4])


@pytest.mark.parametrize("forward", ["full", "mean"])
def test_positive_rescaling_of_w_changes_gradients_and_not_d(forward):
    weight, projection, generator = draw_parameters(3, 2, 2, 4, (3, 3))
    weight *= 0.05  # so that |W̃ ∘ C| ≤ 1 nearly everywhere
    delta = torch.randn(8, 2, 3, 3, dtype=torch.float64, generator=generator)
    factors = torch.tensor([0.5, 2, 3, 1.5], dtype=torch.float64).reshape(4, 1, 1)
    results = []
    for matrices in (projection, factors * projection):
        leaf = weight.clone().requires_grad_()
        quantized, _ = project(leaf, matrices, projection_forward=forward)
        results.append((quantized.detach(), *torch.autograd.grad((quantized * delta).sum(), leaf)))
    (quantized, gradient), (rescaled_quantized, rescaled_gradient) = results
    assert torch.equal(quantized, rescaled_quantized)
    assert not torch.allclose(gradient, rescaled_gradient)


# --- gradients ------------------------------------------------------------------------------------------------------


@few_examples
@given(
    seeds,
    st.tuples(sizes, sizes, st.integers(1, 4)),
    st.tuples(sizes, sizes),
    levels_of_a_layer,
    forwards,
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([1.0, 1024.0, 0.25]),
)
def test_gradients_are_the_equations_times_the_scale_of_the_loss(seed, channels, kernel, levels, fwd, eta, scale):
    originals, in_channels, projections = channels
    weight, projection, generator = draw_parameters(seed, originals, in_channels, projections, kernel)
    # A loss linear in D has its coefficients as δ.
    delta = torch.randn(originals * projections, in_channels, *kernel, dtype=torch.float64, generator=generator)
    leaves = weight.clone().requires_grad_(), projection.clone().requires_grad_()
    quantized, loss = project(*leaves, levels=levels, loss_weight=0.3, eta=eta, projection_forward=fwd)
    actual = torch.autograd.grad(scale * ((quantized * delta).sum() + loss), leaves)

    expected_quantized = reference.quantize(weight, projection, levels=levels, projection_forward=fwd)
    expected = reference.gradients(weight, projection, expected_quantized, delta, loss_weight=0.3, eta=eta)
    for gradient, formula in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient / scale, formula, **EXACT)


def test_indicator_includes_one_and_uses_all_of_w():
    # W̃ ∘ C is (1, 1.25), so that the gradient is W at the first element only; with the mean of W, 0.875, the
    # product would be (1.75, 0.875) and the indicator the other way round.
    weight = torch.tensor([2.0, 1.0]).reshape(1, 1, 1, 2).requires_grad_()
    projection = torch.tensor([0.5, 1.25]).reshape(1, 1, 2)
    quantized, _ = project(weight, projection, projection_forward="mean")
    quantized.sum().backward()
    assert weight.grad.flatten().tolist() == [0.5, 0]


@pytest.mark.parametrize("projections", [1, 3])
def test_eta_square_is_its_formula(projections):
    _, projection, generator = draw_parameters(4, 2, 3, projections, (2, 3))
    delta = torch.randn(2 * projections, 3, 2, 3, dtype=torch.float64, generator=generator)
    expected = torch.zeros_like(projection)
    for o, j, i in itertools.product(range(2), range(projections), range(3)):
        expected[j] += 0.3 * 0.5**2 * projection[j] * delta[o * projections + j, i] ** 2
    torch.testing.assert_close(eta_square(projection, delta, loss_weight=0.3, eta=0.5), expected, **EXACT)
