"""``ModulatedConv2d`` in training: gradients, precision, compilation, copies."""

import pytest
import reference
import torch
import torch.nn.functional as F
from modulated_layers import (
    CONVOLUTIONS,
    KINDS,
    STRIDED,
    THETA,
    assert_gradients,
    draw_batch,
    every_kind,
    make_layer,
    reference_gradients,
    reference_kernels,
    reference_loss,
    reference_quantized,
    task_loss,
)
from reference import EXACT
from torch import nn

from pcnn_lightning.functional import modulate
from pcnn_lightning.layers import ModulatedConv2d

# --- gradients ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("convolution", CONVOLUTIONS[1:4], ids=str)
@pytest.mark.parametrize("kernel_size", [3, (2, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_one_backward_leaves_the_gradients_of_the_equations(kind, planes, average, convolution, kernel_size):
    arguments = {"stride": 1, "padding": 0, "planes": planes, "average": average, **convolution}
    layer, x = make_layer(kind, kernel_size=kernel_size, **arguments), draw_batch()
    loss, expected = reference_loss(layer), reference_gradients(layer, x)
    y = layer(x)
    filter_loss = layer.quantization_loss()
    (task_loss(y) + filter_loss).backward()
    assert filter_loss.item() == pytest.approx(loss, rel=1e-9)
    assert_gradients(layer, expected)


@every_kind
@pytest.mark.parametrize("after_forward", [False, True])
def test_gradients_of_the_filter_loss_alone(kind, planes, average, after_forward):
    layer = make_layer(kind, planes=planes, average=average)
    if after_forward:
        layer(draw_batch())
    loss = layer.quantization_loss()
    loss.backward()
    assert loss.item() == pytest.approx(reference_loss(layer), rel=1e-9)
    assert_gradients(layer, reference_gradients(layer))


@every_kind
def test_gradients_of_the_task_loss_alone(kind, planes, average):
    layer, x = make_layer(kind, planes=planes, average=average), draw_batch()
    task_loss(layer(x)).backward()
    assert_gradients(layer, reference_gradients(layer, x, loss_weight=0.0))


@every_kind
def test_every_term_of_the_reference_matters(kind, planes, average):
    # Without this the tests above could not notice a missing θ, δ or sign of M.
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


def test_gradient_accumulates_over_backward_passes():
    layer = make_layer()
    expected = [torch.zeros_like(parameter) for parameter in layer.parameters()]
    for seed in (1, 2):
        x = draw_batch(seed)
        expected = [so_far + more for so_far, more in zip(expected, reference_gradients(layer, x), strict=True)]
        (task_loss(layer(x)) + layer.quantization_loss()).backward()
    assert_gradients(layer, expected)


def test_gradient_of_the_input_is_that_of_a_convolution_with_q():
    layer, x = make_layer(), draw_batch().requires_grad_()
    (task_loss(layer(x)) + layer.quantization_loss()).backward()
    leaf = x.detach().clone().requires_grad_()
    task_loss(F.conv2d(leaf, reference_kernels(layer), **STRIDED)).backward()
    torch.testing.assert_close(x.grad, leaf.grad, **EXACT)


@pytest.mark.parametrize(("frozen", "learned", "place"), [("modulation", "weight", 0), ("weight", "modulation", 1)])
def test_freezing_one_parameter_does_not_change_the_gradient_of_the_other(frozen, learned, place):
    layer, x = make_layer(), draw_batch()
    expected = reference_gradients(layer, x)[place]
    getattr(layer, frozen).requires_grad_(False)
    (task_loss(layer(x)) + layer.quantization_loss()).backward()
    torch.testing.assert_close(getattr(layer, learned).grad, expected, **EXACT)
    assert getattr(layer, frozen).grad is None


@pytest.mark.parametrize("call", ["forward", "quantized_weight", "quantization_loss"])
def test_no_grad_calls_between_forward_and_loss_do_not_change_gradients(call):
    layer, x = make_layer(), draw_batch()
    y = layer(x)
    with torch.no_grad():
        layer(x) if call == "forward" else getattr(layer, call)()
    (task_loss(y) + layer.quantization_loss()).backward()
    assert_gradients(layer, reference_gradients(layer, x))


def test_a_layer_called_twice_in_one_forward_adds_both_task_gradients():
    layer, first, second = make_layer(), draw_batch(1), draw_batch(2)
    (task_loss(layer(first)) + task_loss(layer(second)) + layer.quantization_loss()).backward()
    parts = reference_gradients(layer, first), reference_gradients(layer, second, loss_weight=0.0)
    assert_gradients(layer, [one + two for one, two in zip(*parts, strict=True)])


@pytest.mark.parametrize("kind", ["mean", "constant", "three", "four"])
def test_descent_on_the_filter_loss_gathers_c_at_its_values(kind):
    layer = make_layer(kind, filter_loss_weight=1.0)
    with torch.no_grad():
        layer.modulation.fill_(1.0)
    wanted = reference_quantized(layer)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(layer.quantization_loss(), layer.weight)
        with torch.no_grad():
            layer.weight -= 0.025 * gradient
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-6, atol=1e-6)


def test_a_network_of_modulated_layers_learns():
    torch.manual_seed(0)
    network = nn.Sequential(ModulatedConv2d(1, 8, 3, levels=4), nn.ReLU(), ModulatedConv2d(8, 4, 3, average=True))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    x = torch.randn(8, 1, 8, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (network(x) - 1).square().mean() + sum(layer.quantization_loss() for layer in network[::2])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- precision ------------------------------------------------------------------------------------------------------


@every_kind
def test_float32_gradients_are_near_the_equations(kind, planes, average):
    layer = make_layer(kind, dtype=torch.float32, planes=planes, average=average)
    x = draw_batch(dtype=torch.float32)
    (task_loss(layer(x)) + layer.quantization_loss()).backward()
    assert layer.weight.grad.dtype == layer.modulation.grad.dtype == torch.float32
    assert_gradients(layer, reference_gradients(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_convolves_in_half_and_keeps_loss_and_gradients_in_float32(kind):
    layer = make_layer(kind, dtype=torch.float32)
    x = draw_batch(dtype=torch.float32).bfloat16().float()  # exact in either precision
    exact_loss = layer.quantization_loss()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        loss = layer.quantization_loss()
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
    loss = layer.quantization_loss()
    (task_loss(y.float()) + loss).backward()
    assert y.dtype == layer.weight.grad.dtype == layer.modulation.grad.dtype == dtype
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_loss(layer), rel=0.02)
    assert layer.modulation.grad.isfinite().all()


def test_a_large_half_precision_residual_does_not_overflow():
    layer = make_layer(dtype=torch.float16, filter_loss_weight=1.0)
    with torch.no_grad():
        layer.weight *= 1000  # whose square float16 does not hold
    assert layer.quantization_loss().isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_format_changes_nothing(kind):
    layer, x = make_layer(kind), draw_batch()
    expected = reference_gradients(layer, x)
    layer = layer.to(memory_format=torch.channels_last)
    layer.refresh_centers()
    (task_loss(layer(x.to(memory_format=torch.channels_last))) + layer.quantization_loss()).backward()
    assert_gradients(layer, expected)


# --- compilation ----------------------------------------------------------------------------------------------------


def check_compiled_gradients(backend, dtype, kind, **tolerance):
    torch._dynamo.reset()
    layer = make_layer(kind, dtype=dtype)

    def total_loss(x):
        return task_loss(layer(x)) + layer.quantization_loss()

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
def test_compiled_gradients(kind):
    check_compiled_gradients("aot_eager", torch.float64, kind, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_gradients(kind):
    check_compiled_gradients("inductor", torch.float32, kind, rtol=1e-4, atol=1e-4)


# --- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copy_between_forward_and_backward_trains_on_its_own(duplicate, kind):
    layer, x = make_layer(kind), draw_batch()
    y = layer(x)
    twin = duplicate(layer)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in twin.state_dict().items())

    expected = reference_gradients(layer, x)
    (task_loss(twin(x)) + twin.quantization_loss()).backward()
    assert_gradients(twin, expected)
    assert layer.weight.grad is None
    (task_loss(y) + layer.quantization_loss()).backward()
    assert_gradients(layer, expected)
