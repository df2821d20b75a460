"""MCN's functions and layer against the equations, written out a second time in ``reference.py``."""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

from pcnn_lightning.functional import kmeans_1d, modulate, nearest
from pcnn_lightning.layers import ModulatedConv2d

EXACT = {"rtol": 1e-9, "atol": 1e-9}
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
few_examples = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.integers(1, 3)
seeds = st.integers(0, 2**31 - 1)


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
    """What a backward pass is to leave in the layer; without ``x``, that of the filter loss alone."""
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


# --- forward ----------------------------------------------------------------------------------------------------


def explicit_convolution(x, kernels, stride, padding, dilation):
    """F_out^{h,k} = Σ_i F_in^i ∗ Q_{hk}^i (3.16), tap by tap."""
    height, width = kernels.shape[-2:]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    rows = (padded.shape[-2] - dilation[0] * (height - 1) - 1) // stride[0] + 1
    columns = (padded.shape[-1] - dilation[1] * (width - 1) - 1) // stride[1] + 1
    result = torch.zeros(len(x), len(kernels), rows, columns, dtype=torch.float64)
    for channel, i, u, v in itertools.product(*map(range, kernels.shape)):
        top, left = u * dilation[0], v * dilation[1]
        shifted = padded[:, i, top :: stride[0], left :: stride[1]][:, :rows, :columns]
        result[:, channel] += shifted * kernels[channel, i, u, v]
    return result


@few_examples
@given(
    seeds,
    st.tuples(sizes, sizes, st.integers(1, 4)),
    st.tuples(sizes, st.integers(1, 4)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 1)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from(list(KINDS)),
    st.booleans(),
)
def test_a_layer_is_the_sum_over_input_channels(seed, channels, kernel_size, stride, padding, dilation, kind, average):
    originals, in_channels, planes = channels
    torch.manual_seed(seed)
    shape = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    layer = ModulatedConv2d(
        in_channels, originals * planes, **shape, planes=planes, average=average, **KINDS[kind]
    ).double()
    x = torch.randn(2, in_channels, 6, 7, dtype=torch.float64)
    expected = explicit_convolution(x, reference_kernels(layer), stride, padding, dilation)
    torch.testing.assert_close(layer(x), expected, **EXACT)


@every_kind
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, (2, 3), 4], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_forward_is_a_convolution_with_q(kind, planes, average, convolution, kernel_size):
    arguments = {"stride": 1, "padding": 0, "planes": planes, "average": average, **convolution}
    layer = make_layer(kind, kernel_size=kernel_size, **arguments)
    x, expected = draw_batch(), reference_kernels(layer)
    torch.testing.assert_close(layer.quantized_weight(), expected, **EXACT)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected, **convolution), **EXACT)


def test_forward_takes_the_input_as_it_is():
    layer, x = make_layer(), draw_batch()
    assert not torch.allclose(layer(x), layer(x.sign()))


@pytest.mark.parametrize(("levels", "centers"), [(2, {}), (3, {"centers": (3,)}), (4, {"centers": (4,)})])
def test_shapes_and_state_are_the_contract(levels, centers):
    layer = ModulatedConv2d(3, 8, (2, 3), planes=4, levels=levels)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (2, 3, 2, 3),
        "modulation": (4, 2, 3),
        **centers,
    }
    assert dict(layer.named_parameters()).keys() == {"weight", "modulation"}
    assert layer.quantized_weight().shape == (8, 3, 2, 3)
    assert not layer.quantized_weight().requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_signs_of_m_change_no_output_and_only_the_signs_of_its_gradient(kind, planes, average, dtype):
    layer = make_layer(kind, dtype=dtype, planes=planes, average=average)
    x = draw_batch(dtype=dtype)
    flips = reference.sign(torch.randn(layer.modulation.shape, dtype=dtype, generator=torch.Generator().manual_seed(5)))
    outcomes = []
    for factor in (1, -1, flips):
        layer.zero_grad()
        with torch.no_grad():
            layer.modulation *= factor
        y, kernels = layer(x), layer.quantized_weight()
        loss = layer.filter_loss()
        (task_loss(y) + loss).backward()
        of_magnitude = layer.modulation.grad * layer.modulation.detach().sign()
        outcomes.append((y, kernels, loss, layer.weight.grad.clone(), of_magnitude))
    for outcome in outcomes[1:]:
        assert all(itertools.starmap(torch.equal, zip(outcome, outcomes[0], strict=True)))


@pytest.mark.parametrize("average", [False, True])
def test_m_of_zero_is_of_positive_sign(average):
    layer = make_layer(average=average)
    with torch.no_grad():
        layer.modulation[0] = 0.0
        layer.modulation[1, 0] = -0.0
    x = draw_batch()
    expected = reference_gradients(layer, x)
    assert expected[1][0].any()
    (task_loss(layer(x)) + layer.filter_loss()).backward()
    assert_gradients(layer, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planes_of_mcn_1_are_constant(kind, dtype):
    layer = make_layer(kind, dtype=dtype, average=True)
    kernels = layer.quantized_weight().unflatten(0, (2, 4))
    with torch.no_grad():
        by_hand = layer.modulation.abs().mean(dim=(1, 2))
        layer.modulation.copy_(by_hand.reshape(4, 1, 1).expand(4, 3, 3))
        layer.average = False
    constant = layer.quantized_weight().unflatten(0, (2, 4))
    torch.testing.assert_close(kernels, constant)
    ratios = kernels[:, 1:] / kernels[:, :1]  # of planes: one number each, wherever in the kernel
    torch.testing.assert_close(ratios, (by_hand[1:] / by_hand[0]).reshape(1, 3, 1, 1, 1).expand_as(ratios))


def test_two_levels_hold_two_values_even_where_c_is_zero():
    layer = make_layer(modulation_init="ones", planes=1)
    with torch.no_grad():
        layer.modulation.fill_(1.0)
        layer.weight[0] = 0.0
        layer.weight[1, 0] = -0.0
    scale, kernels = layer.weight.detach().abs().mean().item(), layer.quantized_weight()
    assert kernels.unique().tolist() == pytest.approx([-scale, scale])
    assert (kernels[layer.weight == 0] > 0).all()


def test_a_constant_scale_is_used_as_it_is():
    layer = make_layer("constant")
    with torch.no_grad():
        layer.modulation.fill_(1.0)
        layer.weight *= 100
    assert layer.quantized_weight().unique().tolist() == [-0.4, 0.4]


def test_mean_scale_follows_c_in_every_forward():
    layer, x = make_layer(), draw_batch()
    before = layer(x)
    with torch.no_grad():
        layer.weight *= 2
    torch.testing.assert_close(layer(x), 2 * before, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_levels_are_so_many_values_and_a_lower_reconstruction_error(dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 32, 3, 3, dtype=dtype)
    errors = {}
    for levels in (2, 3, 4):
        layer = ModulatedConv2d(32, 64, 3, planes=1, levels=levels, modulation_init="ones").to(dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer.refresh_centers()
        kernels = layer.quantized_weight()
        assert len(kernels.unique()) == levels
        errors[levels] = (kernels - weight).square().mean().item()
        assert layer.filter_loss().item() == pytest.approx(0.5e-4 * errors[levels] * weight.numel(), rel=1e-5)
    # Distortion of the best 2, 3 and 4 levels of a Gaussian of unit variance (Max, 1960).
    assert [errors[levels] for levels in (2, 3, 4)] == pytest.approx([0.3634, 0.1902, 0.1175], rel=0.05)


def test_mcn_without_binarisation_modulates_the_kernels_themselves():
    layer = make_layer("unbinarised")
    with torch.no_grad():
        layer.modulation.fill_(-1.0)
    assert torch.equal(layer.quantized_weight(), layer.weight.repeat_interleave(4, dim=0))
    assert layer.filter_loss() == 0


# --- gradients --------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("convolution", CONVOLUTIONS[1:4], ids=str)
@pytest.mark.parametrize("kernel_size", [3, (2, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_one_backward_leaves_the_gradients_of_the_equations(kind, planes, average, convolution, kernel_size):
    arguments = {"stride": 1, "padding": 0, "planes": planes, "average": average, **convolution}
    layer, x = make_layer(kind, kernel_size=kernel_size, **arguments), draw_batch()
    loss, expected = reference_loss(layer), reference_gradients(layer, x)
    y = layer(x)
    filter_loss = layer.filter_loss()
    (task_loss(y) + filter_loss).backward()
    assert filter_loss.item() == pytest.approx(loss, rel=1e-9)
    assert_gradients(layer, expected)


@every_kind
@pytest.mark.parametrize("after_forward", [False, True])
def test_filter_loss_alone_is_the_plain_residual(kind, planes, average, after_forward):
    layer = make_layer(kind, planes=planes, average=average)
    if after_forward:
        layer(draw_batch())
    loss = layer.filter_loss()
    loss.backward()
    assert loss.item() == pytest.approx(reference_loss(layer), rel=1e-9)
    assert_gradients(layer, reference_gradients(layer))


@every_kind
def test_without_the_filter_loss_only_the_task_part_is_left(kind, planes, average):
    layer, x = make_layer(kind, planes=planes, average=average), draw_batch()
    task_loss(layer(x)).backward()
    assert_gradients(layer, reference_gradients(layer, x, loss_weight=0.0))


@every_kind
def test_every_term_of_the_reference_matters(kind, planes, average):
    # Guards the tests above: were θ, δ or the sign of M to have no weight there, they could not see it.
    layer, x = make_layer(kind, planes=planes, average=average), draw_batch()
    exact, task_only, loss_only = (
        reference_gradients(layer, x),
        reference_gradients(layer, x, loss_weight=0.0),
        reference_gradients(layer),
    )
    for gradient, task, loss in zip(exact, task_only, loss_only, strict=True):
        assert task.norm() > 0.005 * gradient.norm()
        assert loss.norm() > 0.005 * gradient.norm()
    assert layer.modulation.min() < 0 < layer.modulation.max()


@every_kind
def test_the_reference_gradients_are_the_derivatives_of_the_reference_loss(kind, planes, average):
    # By central differences; Ĉ is a constant of it, which is exact in M as M has no part in Ĉ.
    layer = make_layer(kind, planes=planes, average=average)
    weight, modulation, quantized = layer.weight.detach(), layer.modulation.detach(), reference_quantized(layer)
    expected = reference_gradients(layer)
    step = 1e-4
    for values, formula in zip((weight, modulation), expected, strict=True):
        for place in [(0,) * values.dim(), (-1,) * values.dim()]:
            losses = []
            for side in (step, -step):
                moved = values.clone()
                moved[place] += side
                both = (moved, modulation) if values is weight else (weight, moved)
                losses.append(reference.filter_loss(*both, quantized, THETA, average))
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(formula[place].item(), rel=1e-4, abs=1e-4)


@every_kind
def test_the_gradient_of_m_is_the_true_derivative_of_both_results(kind, planes, average):
    layer = make_layer(kind, planes=planes, average=average)

    def of_modulation(modulation):
        return modulate(
            layer.weight.detach(),
            modulation,
            scale=layer.scale,
            centers=layer.centers,
            binarize=layer.binarize,
            average=average,
            loss_weight=THETA,
        )

    assert layer.modulation.abs().min() > 1e-4
    assert torch.autograd.gradcheck(of_modulation, layer.modulation.detach().requires_grad_())


@few_examples
@given(
    seeds,
    st.tuples(sizes, sizes, st.integers(1, 5)),
    st.tuples(sizes, st.integers(1, 4)),
    st.sampled_from(list(KINDS)),
    st.booleans(),
    st.sampled_from([1.0, 1024.0, 0.25]),
)
def test_gradients_are_the_equations_times_the_scale_of_the_loss(seed, channels, kernel, kind, average, scale):
    originals, in_channels, planes = channels
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(originals, in_channels, *kernel, dtype=torch.float64, generator=generator)
    modulation = torch.randn(planes, *kernel, dtype=torch.float64, generator=generator)
    # A loss linear in Q has its coefficients as δ.
    delta = torch.randn(originals * planes, in_channels, *kernel, dtype=torch.float64, generator=generator)
    levels = KINDS[kind].get("levels", 2)
    chosen = {"scale": KINDS[kind].get("scale"), "binarize": kind != "unbinarised"}
    chosen["centers"] = kmeans_1d(weight, levels) if levels > 2 else None
    leaves = weight.clone().requires_grad_(), modulation.clone().requires_grad_()
    modulated, loss = modulate(*leaves, average=average, loss_weight=0.3, **chosen)
    actual = torch.autograd.grad(scale * ((modulated * delta).sum() + loss), leaves)

    quantized = reference.quantize_by_levels(weight, **chosen)
    torch.testing.assert_close(modulated.detach(), reference.modulate(quantized, modulation, average), **EXACT)
    expected = reference.modulation_gradients(weight, modulation, quantized, delta, loss_weight=0.3, average=average)
    for gradient, formula in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient / scale, formula, **EXACT)


@few_examples
@given(
    seeds,
    st.tuples(sizes, sizes, st.integers(1, 5)),
    st.tuples(sizes, st.integers(1, 4)),
    st.floats(0.01, 100),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_modulated_kernels_have_their_shape_and_range(seed, channels, kernel, scale, average, dtype):
    originals, in_channels, planes = channels
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(originals, in_channels, *kernel, dtype=dtype, generator=generator)
    modulation = torch.randn(planes, *kernel, dtype=dtype, generator=generator)
    modulated, loss = modulate(weight, modulation, scale=scale, average=average, loss_weight=0.3)
    assert modulated.shape == (originals * planes, in_channels, *kernel)
    assert modulated.dtype == dtype
    assert loss.shape == ()
    assert loss.dtype == dtype
    assert loss >= 0
    assert modulated.abs().max() <= scale * modulation.abs().max() * (1 + 1e-6)
    signs = modulated.sign().unflatten(0, (originals, planes))
    assert torch.equal(signs, weight.sign().unsqueeze(1).expand_as(signs))  # whatever the signs of M


def test_gradient_accumulates_over_backward_passes():
    layer = make_layer()
    expected = [torch.zeros_like(parameter) for parameter in layer.parameters()]
    for seed in (1, 2):
        x = draw_batch(seed)
        expected = [so_far + more for so_far, more in zip(expected, reference_gradients(layer, x), strict=True)]
        (task_loss(layer(x)) + layer.filter_loss()).backward()
    assert_gradients(layer, expected)


def test_gradient_of_the_input_is_that_of_a_convolution_with_q():
    layer, x = make_layer(), draw_batch().requires_grad_()
    (task_loss(layer(x)) + layer.filter_loss()).backward()
    leaf = x.detach().clone().requires_grad_()
    task_loss(F.conv2d(leaf, reference_kernels(layer), **STRIDED)).backward()
    torch.testing.assert_close(x.grad, leaf.grad, **EXACT)


@pytest.mark.parametrize(("frozen", "learned", "place"), [("modulation", "weight", 0), ("weight", "modulation", 1)])
def test_what_is_frozen_leaves_the_other_gradient_as_it_is(frozen, learned, place):
    layer, x = make_layer(), draw_batch()
    expected = reference_gradients(layer, x)[place]
    getattr(layer, frozen).requires_grad_(False)
    (task_loss(layer(x)) + layer.filter_loss()).backward()
    torch.testing.assert_close(getattr(layer, learned).grad, expected, **EXACT)
    assert getattr(layer, frozen).grad is None


@pytest.mark.parametrize("kind", ["mean", "constant", "three", "four"])
def test_descent_on_the_filter_loss_gathers_c_at_its_values(kind):
    layer = make_layer(kind, filter_loss_weight=1.0)
    with torch.no_grad():
        layer.modulation.fill_(1.0)
    wanted = reference_quantized(layer)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(layer.filter_loss(), layer.weight)
        with torch.no_grad():
            layer.weight -= 0.025 * gradient
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-6, atol=1e-6)


# --- when the loss is handed out --------------------------------------------------------------------------------


def test_filter_loss_has_the_same_value_wherever_it_is_taken():
    layer, x = make_layer(), draw_batch()
    before = layer.filter_loss()
    layer(x)
    of_forward, again = layer.filter_loss(), layer.filter_loss()
    with torch.no_grad():
        layer(x)
        without_gradient = layer.filter_loss()
    layer.eval()
    layer(x)
    assert before == of_forward == again == without_gradient == layer.filter_loss()
    assert not without_gradient.requires_grad


def double_the_kernels(layer):
    """Doubles C, and with it Ĉ; the loss becomes four times what it was."""
    with torch.no_grad():
        layer.weight *= 2


def test_filter_loss_is_handed_out_once_and_then_of_the_kernels_as_they_are():
    layer = make_layer()
    layer(draw_batch())
    double_the_kernels(layer)
    of_forward = layer.filter_loss().item()
    assert layer.filter_loss().item() == pytest.approx(4 * of_forward)


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_without_training_or_gradient_keeps_no_loss(training):
    layer = make_layer().train(training)
    before = layer.filter_loss().item()
    with torch.set_grad_enabled(not training):
        layer(draw_batch())
    double_the_kernels(layer)
    assert layer.filter_loss().item() == pytest.approx(4 * before)


@pytest.mark.parametrize("mode", [True, False])
def test_changing_the_mode_forgets_the_loss_of_the_forward_before(mode):
    layer = make_layer()
    before = layer.filter_loss().item()
    layer(draw_batch())
    layer.train(mode)
    double_the_kernels(layer)
    assert layer.filter_loss().item() == pytest.approx(4 * before)


def test_filter_loss_read_without_gradient_has_none():
    layer, x = make_layer(), draw_batch()
    layer(x)
    with torch.no_grad():
        assert not layer.filter_loss().requires_grad


@pytest.mark.parametrize("look", ["forward", "quantized_weight", "filter_loss"])
def test_looking_without_gradient_between_forward_and_loss_changes_no_gradient(look):
    layer, x = make_layer(), draw_batch()
    y = layer(x)
    with torch.no_grad():
        layer(x) if look == "forward" else getattr(layer, look)()
    (task_loss(y) + layer.filter_loss()).backward()
    assert_gradients(layer, reference_gradients(layer, x))


def test_a_layer_called_twice_in_one_forward_adds_both_task_gradients():
    layer, first, second = make_layer(), draw_batch(1), draw_batch(2)
    (task_loss(layer(first)) + task_loss(layer(second)) + layer.filter_loss()).backward()
    parts = reference_gradients(layer, first), reference_gradients(layer, second, loss_weight=0.0)
    assert_gradients(layer, [one + two for one, two in zip(*parts, strict=True)])


# --- centres ----------------------------------------------------------------------------------------------------


def naive_nearest(x, centers):
    """Of two equally near, the higher."""
    return [max(centers, key=lambda center: (-abs(value - center), center)) for value in x]


@few_examples
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30),
    st.lists(st.integers(-40, 40), min_size=1, max_size=4, unique=True),
)
def test_nearest_is_the_centre_at_the_least_distance_and_the_higher_of_two(values, centers):
    x = torch.tensor(values, dtype=torch.float64) / 4  # exact, so that many lie half-way
    rising = torch.tensor(sorted(centers), dtype=torch.float64)
    assert nearest(x, rising).tolist() == naive_nearest(x.tolist(), rising.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [3, 4])
def test_nearest_is_the_least_distance_in_any_shape(dtype, count):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(4, 3, 5, 5, dtype=dtype, generator=generator)
    centers = torch.randn(count, dtype=dtype, generator=generator).sort().values
    rounded = nearest(x, centers)
    assert torch.equal(rounded, centers[(x.unsqueeze(-1) - centers).abs().argmin(-1)])
    assert rounded.dtype == dtype


def test_nearest_rounds_a_half_up():
    centers = torch.tensor([-2.0, 0.0, 1.0])
    assert nearest(torch.tensor([-1.0, 0.5, -9.0, 9.0]), centers).tolist() == [0, 1, -2, 1]


def gaussian(count, dtype=torch.float64, seed=0):
    return torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def two_lobes(count):
    return torch.cat([gaussian(count // 3) / 4 - 1, gaussian(count - count // 3, seed=1) / 8 + 2])


def inertia(x, centers):
    return (x.unsqueeze(-1) - centers).square().min(-1).values.sum().item()


def least_inertia(x, count):
    """The least sum of squared distances of any way to cut the sorted numbers into ``count`` runs."""
    ordered, total = x.sort().values, len(x)
    cost = torch.full((total + 1, total + 1), math.inf, dtype=torch.float64)  # of the run from start to before end
    for start in range(total):
        sizes_of_runs, run = torch.arange(1, total - start + 1), ordered[start:]
        cost[start, start + 1 :] = run.square().cumsum(0) - run.cumsum(0).square() / sizes_of_runs
    best = cost[0]
    for _ in range(count - 1):
        best = (best.unsqueeze(-1) + cost).min(0).values
    return best[total].item()


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("draw", [gaussian, two_lobes])
def test_centres_are_where_scikit_learn_ends_from_the_same_quantiles(count, draw):
    x = draw(3000)
    start = x.sort().values[[3000 * (2 * place + 1) // (2 * count) for place in range(count)]]
    peer = KMeans(count, init=start.reshape(-1, 1).numpy(), n_init=1, tol=0, max_iter=100, algorithm="lloyd")
    expected = np.sort(peer.fit(x.reshape(-1, 1).numpy()).cluster_centers_.flatten())
    torch.testing.assert_close(kmeans_1d(x, count), torch.from_numpy(expected), **EXACT)


@pytest.mark.parametrize("count", [3, 4])
def test_centres_of_a_gaussian_are_as_good_as_those_of_many_restarts(count):
    x = gaussian(20_000)
    peer = KMeans(count, n_init=10, random_state=0, tol=0).fit(x.reshape(-1, 1).numpy())
    assert inertia(x, kmeans_1d(x, count)) <= 1.001 * peer.inertia_


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_centres_of_a_gaussian_are_near_the_best_of_all(count, seed):
    x = gaussian(300, seed=seed)
    best = least_inertia(x, count)
    assert best * (1 - 1e-9) <= inertia(x, kmeans_1d(x, count)) <= 1.02 * best


@few_examples
@given(seeds, st.integers(1, 200), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
def test_each_centre_is_the_mean_of_the_numbers_nearest_to_it(seed, total, count, dtype):
    x = gaussian(total, dtype, seed)
    centers = kmeans_1d(x, count)
    assert centers.shape == (count,)
    assert centers.dtype == dtype
    assert (centers.diff() >= 0).all()
    assert x.min() <= centers.min()
    assert centers.max() <= x.max()
    rounded = nearest(x, centers)
    for center in rounded.unique():
        mean = x[rounded == center].double().mean().to(dtype)
        torch.testing.assert_close(center, mean, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [3, 4])
def test_centres_do_not_depend_on_order_or_shape(dtype, count):
    x = gaussian(5000, dtype)
    shuffled = x[torch.randperm(5000, generator=torch.Generator().manual_seed(1))].reshape(50, 4, 5, 5)
    state = torch.get_rng_state()
    expected = kmeans_1d(x, count)
    assert torch.equal(kmeans_1d(shuffled, count), expected)
    assert torch.equal(kmeans_1d(x.flip(0), count), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 4])
def test_centres_are_found_in_double_precision_and_rounded_once(dtype, count):
    x = gaussian(50_000, torch.float32).to(dtype)
    assert torch.equal(kmeans_1d(x, count), kmeans_1d(x.double(), count).to(dtype))


def test_centres_are_not_part_of_a_graph_and_leave_their_numbers_alone():
    x = gaussian(50).requires_grad_()
    before = x.detach().clone()
    assert not kmeans_1d(x, 3).requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("value", [0.1, -0.3, 0.0])
@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_centres_of_equal_numbers_are_that_number(value, total):
    x = torch.full((total,), value)
    assert torch.equal(kmeans_1d(x, 4), x[:1].expand(4))
    assert torch.equal(nearest(x, kmeans_1d(x, 4)), x)


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("values", [[1.0, -1.0], [0.25, 0.25, 0.25, 8.0], [-1.0, 0.0, 0.0, 0.0, 0.0, 2.0]], ids=str)
def test_fewer_distinct_numbers_than_centres_are_all_centres(count, values):
    x = torch.tensor(values)
    centers = kmeans_1d(x, count)
    assert centers.isfinite().all()
    assert (centers.diff() >= 0).all()
    assert set(centers.tolist()) <= {*values, *naive_nearest(values, centers.tolist())}
    if len(set(values)) == 2:
        assert torch.equal(nearest(x, centers), x)


@pytest.mark.parametrize("levels", [3, 4])
def test_a_layer_of_equal_kernels_is_rounded_to_them(levels):
    layer = ModulatedConv2d(3, 4, 3, levels=levels, planes=1, modulation_init="ones")
    with torch.no_grad():
        layer.weight.fill_(0.1)
    layer.refresh_centers()
    assert torch.equal(layer.quantized_weight(), layer.weight)
    assert layer.filter_loss() == 0


@pytest.mark.parametrize("values", [[math.nan] * 5, [1.0, 2.0, math.nan, 4.0, 5.0]], ids=["all", "one"])
@pytest.mark.parametrize("count", [3, 4])
def test_nan_ends_in_centres_that_show_it(values, count):
    centers = kmeans_1d(torch.tensor(values), count)
    assert centers.shape == (count,)
    assert centers.isnan().any()


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_nan_among_the_kernels_shows_in_the_loss(levels):
    layer = ModulatedConv2d(3, 4, 3, levels=levels)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = math.nan
    assert layer.filter_loss().isnan()
    layer.refresh_centers()
    assert layer.filter_loss().isnan()


@pytest.mark.parametrize("kind", ["three", "four"])
def test_centres_change_only_when_they_are_refreshed(kind):
    layer, x = make_layer(kind), draw_batch()
    before = layer.centers.clone()
    with torch.no_grad():
        layer.weight *= 3
    for training in (True, False):
        layer.train(training)
        (task_loss(layer(x)) + layer.filter_loss()).backward()
        layer.quantized_weight()
        assert torch.equal(layer.centers, before)
    layer.refresh_centers()
    torch.testing.assert_close(layer.centers, 3 * before, **EXACT)
    assert not layer.centers.requires_grad


@pytest.mark.parametrize("kind", ["three", "four"])
def test_centres_travel_with_the_state_and_are_used_as_they_came(kind):
    layer, other = make_layer(kind, dtype=torch.float32), make_layer(kind, seed=1, dtype=torch.float32)
    with torch.no_grad():
        layer.weight += 0.5  # so that its centres are no longer those of its kernels
    other.load_state_dict(layer.state_dict())
    x = draw_batch(dtype=torch.float32)
    assert torch.equal(other.centers, layer.centers)
    assert torch.equal(other(x), layer(x))


def test_refreshing_two_levels_does_nothing():
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    layer.refresh_centers()
    assert layer.centers is None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_refreshed_centres_make_the_next_loss():
    layer = make_layer("three")
    with torch.no_grad():
        layer.weight += 0.5
    layer(draw_batch())
    stale = reference_loss(layer)
    layer.refresh_centers()
    loss = layer.filter_loss().item()
    assert loss == pytest.approx(reference_loss(layer), rel=1e-9)
    assert loss != pytest.approx(stale, rel=1e-3)


@pytest.mark.parametrize("levels", [3, 4])
def test_a_new_layer_has_the_centres_of_its_kernels_and_so_has_a_reset_one(levels):
    torch.manual_seed(0)
    layer = ModulatedConv2d(3, 8, 3, levels=levels)
    for _ in range(2):
        assert torch.equal(layer.centers, kmeans_1d(layer.weight, levels))
        before = layer.weight.detach().clone()
        layer.reset_parameters()
        assert not torch.equal(layer.weight, before)


# --- precision --------------------------------------------------------------------------------------------------


@every_kind
def test_float32_gradients_are_near_the_equations(kind, planes, average):
    layer = make_layer(kind, dtype=torch.float32, planes=planes, average=average)
    x = draw_batch(dtype=torch.float32)
    (task_loss(layer(x)) + layer.filter_loss()).backward()
    assert layer.weight.grad.dtype == layer.modulation.grad.dtype == torch.float32
    assert_gradients(layer, reference_gradients(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_convolves_in_half_and_keeps_loss_and_gradients_in_float32(kind):
    layer = make_layer(kind, dtype=torch.float32)
    x = draw_batch(dtype=torch.float32).bfloat16().float()  # exact in either precision
    exact_loss = layer.filter_loss()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        loss = layer.filter_loss()
        total = task_loss(y.float()) + loss
    total.backward()
    assert y.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss == exact_loss
    assert layer.weight.grad.dtype == layer.modulation.grad.dtype == torch.float32
    # 8 bits of mantissa in Q, y and δ
    for parameter, formula in zip((layer.weight, layer.modulation), reference_gradients(layer, x), strict=True):
        assert (parameter.grad - formula).norm() < 0.02 * formula.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_layer_has_a_float32_loss(dtype, kind):
    layer = make_layer(kind, dtype=dtype)
    x = draw_batch(dtype=dtype)
    y = layer(x)
    loss = layer.filter_loss()
    (task_loss(y.float()) + loss).backward()
    assert y.dtype == layer.weight.grad.dtype == layer.modulation.grad.dtype == dtype
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_loss(layer), rel=0.02)
    assert layer.modulation.grad.isfinite().all()


def test_a_large_half_precision_residual_does_not_overflow():
    layer = make_layer(dtype=torch.float16, filter_loss_weight=1.0)
    with torch.no_grad():
        layer.weight *= 1000  # whose square float16 does not hold
    assert layer.filter_loss().isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_format_changes_nothing(kind):
    layer, x = make_layer(kind), draw_batch()
    expected = reference_gradients(layer, x)
    layer = layer.to(memory_format=torch.channels_last)
    layer.refresh_centers()
    (task_loss(layer(x.to(memory_format=torch.channels_last))) + layer.filter_loss()).backward()
    assert_gradients(layer, expected)


# --- compilation ------------------------------------------------------------------------------------------------


def compiled_gradients_are_the_equations(backend, dtype, kind, **tolerance):
    torch._dynamo.reset()
    layer = make_layer(kind, dtype=dtype)

    def total_loss(x):
        return task_loss(layer(x)) + layer.filter_loss()

    compiled = torch.compile(total_loss, fullgraph=True, backend=backend)
    for seed in range(2):
        layer.zero_grad()
        x = draw_batch(seed, dtype)
        expected = reference_gradients(layer, x)
        compiled(x).backward()
        assert_gradients(layer, expected, **tolerance)
        with torch.no_grad():  # the compiled graph must see what changed
            layer.weight += 0.1
            layer.modulation -= 0.1
        layer.refresh_centers()


@pytest.mark.parametrize("kind", ["mean", "four"])
def test_compiled_without_graph_breaks_the_gradients_are_the_same(kind):
    compiled_gradients_are_the_equations("aot_eager", torch.float64, kind, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_leaves_the_same_gradients(kind):
    compiled_gradients_are_the_equations("inductor", torch.float32, kind, rtol=1e-4, atol=1e-4)


# --- initial values ---------------------------------------------------------------------------------------------


def many_modulations(modulation_init):
    torch.manual_seed(0)
    layer = ModulatedConv2d(1, 4096, 3, planes=4096, modulation_init=modulation_init)
    return layer.modulation.detach().flatten()  # 36,864 numbers


@pytest.mark.parametrize(("modulation_init", "mean", "deviation"), [("normal", 0.0, 1.0), ("near_one", 1.0, 0.1)])
def test_gaussian_modulations(modulation_init, mean, deviation):
    drawn = (many_modulations(modulation_init) - mean) / deviation
    assert drawn.mean().item() == pytest.approx(0, abs=0.03)
    assert drawn.std().item() == pytest.approx(1, abs=0.03)
    assert (drawn.abs() <= 1).double().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.02)


def test_uniform_modulations():
    drawn = many_modulations("uniform")
    assert drawn.min() >= 0
    assert drawn.max() <= 2
    assert drawn.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx([0.5, 1, 1.5], abs=0.03)


def test_one_modulations():
    assert many_modulations("ones").unique().tolist() == [1]


def test_modulations_are_normal_by_default():
    torch.manual_seed(0)
    drawn = ModulatedConv2d(1, 4096, 3, planes=4096).modulation.detach().flatten()
    assert torch.equal(drawn, many_modulations("normal"))


def test_kernels_have_unit_gain_for_their_fan_in():
    torch.manual_seed(0)
    weight = ModulatedConv2d(16, 256, 3, planes=4).weight.detach()
    assert weight.mean().item() == pytest.approx(0, abs=0.01)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.05)


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"groups": 2}, ["groups", "1", "2"]),
        ({"out_channels": 6, "planes": 4}, ["planes", "out_channels=6", "4"]),
        ({"planes": 0}, ["planes", "0", "at least 1"]),
        ({"planes": -4}, ["planes", "-4", "at least 1"]),
        ({"planes": 2.0}, ["planes", "2.0", "integer"]),
        ({"in_channels": 0}, ["in_channels", "0", "at least 1"]),
        ({"out_channels": 0}, ["out_channels", "0", "at least 1"]),
        ({"kernel_size": 0}, ["kernel_size", "0", "at least 1"]),
        ({"kernel_size": (3, 0)}, ["kernel_size", "(3, 0)", "at least 1"]),
        ({"kernel_size": (3, 3, 3)}, ["kernel_size", "(3, 3, 3)", "pair"]),
        ({"stride": 0}, ["stride", "0", "at least 1"]),
        ({"dilation": (1, 0)}, ["dilation", "(1, 0)", "at least 1"]),
        ({"padding": -1}, ["padding", "-1", "at least 0"]),
        ({"padding": "full"}, ["padding", "'full'", "valid", "same"]),
        ({"padding": "same", "stride": 2}, ["padding", "'same'", "stride", "2"]),
        ({"levels": 1}, ["levels", "1", "2, 3 or 4"]),
        ({"levels": 5}, ["levels", "5", "2, 3 or 4"]),
        ({"levels": "three"}, ["levels", "'three'", "2, 3 or 4"]),
        ({"modulation_init": "zeros"}, ["modulation_init", "'zeros'", "normal", "uniform", "near_one", "ones"]),
        ({"scale": 0.0}, ["scale", "0.0", "positive"]),
        ({"scale": -0.4}, ["scale", "-0.4", "positive"]),
        ({"scale": math.nan}, ["scale", "nan", "positive"]),
        ({"scale": math.inf}, ["scale", "inf", "positive"]),
        ({"scale": "mean"}, ["scale", "'mean'", "positive"]),
        ({"scale": 0.4, "levels": 3}, ["scale", "levels is 3", "two levels"]),
        ({"filter_loss_weight": -1e-4}, ["filter_loss_weight", "-0.0001", "at least 0"]),
        ({"filter_loss_weight": math.nan}, ["filter_loss_weight", "nan", "at least 0"]),
        ({"filter_loss_weight": math.inf}, ["filter_loss_weight", "inf", "at least 0"]),
        ({"filter_loss_weight": None}, ["filter_loss_weight", "None", "at least 0"]),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_with_their_value_and_what_is_allowed(arguments, parts):
    correct = {"in_channels": 3, "out_channels": 8, "kernel_size": 3}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked part by part
        ModulatedConv2d(**{**correct, **arguments})
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (2, 2, 7, 6), (7, 6), (1, 2, 3, 7, 6)], ids=str)
def test_forward_refuses_other_input_channels(shape):
    with pytest.raises(ValueError, match=r"in_channels=3") as error:
        make_layer()(torch.zeros(shape, dtype=torch.float64))
    assert str(shape) in str(error.value)


def test_an_integer_scale_and_no_filter_loss_are_allowed():
    layer = make_layer(scale=1, filter_loss_weight=0)
    x = draw_batch()
    (task_loss(layer(x)) + layer.filter_loss()).backward()
    assert layer.filter_loss() == 0
    assert_gradients(layer, reference_gradients(layer, x, loss_weight=0.0))


# --- copies -----------------------------------------------------------------------------------------------------


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_made_between_forward_and_backward_trains_on_its_own(duplicate, kind):
    layer, x = make_layer(kind), draw_batch()
    y = layer(x)
    twin = duplicate(layer)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in twin.state_dict().items())

    expected = reference_gradients(layer, x)
    (task_loss(twin(x)) + twin.filter_loss()).backward()
    assert_gradients(twin, expected)
    assert layer.weight.grad is None
    (task_loss(y) + layer.filter_loss()).backward()
    assert_gradients(layer, expected)


def test_a_shallow_copy_keeps_no_loss_of_the_forward_of_the_other():
    layer = make_layer()
    layer(draw_batch())
    twin = copy.copy(layer)
    double_the_kernels(layer)  # of both: a shallow copy shares its parameters
    of_forward = layer.filter_loss().item()
    assert twin.filter_loss().item() == pytest.approx(4 * of_forward)


def test_a_layer_of_a_network_learns_by_an_optimiser():
    torch.manual_seed(0)
    network = nn.Sequential(ModulatedConv2d(1, 8, 3, levels=4), nn.ReLU(), ModulatedConv2d(8, 4, 3, average=True))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    x = torch.randn(8, 1, 8, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (network(x) - 1).square().mean() + sum(layer.filter_loss() for layer in network[::2])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
