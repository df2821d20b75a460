"""Layers: the gradients they leave behind in every kind of loop, compilation, precision, arguments, copies."""

import copy
import io
import itertools
import math
import pickle
from contextlib import nullcontext

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pcnn_lightning.layers import ProjectionConv2d, SignActivation

EXACT = {"rtol": 1e-9, "atol": 1e-9}
LAMBDA, ETA = 0.3, 0.5  # large, so that every term of the gradients matters
CONVOLUTION = {"stride": 2, "padding": 1}
IN, OUT, BATCH = 3, 8, 4

every_kind = pytest.mark.parametrize(
    ("projections", "levels", "forward"), list(itertools.product([1, 4], ["binary", "ternary"], ["full", "mean"]))
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
    """What one step on the whole batch is to leave in the layer, from the equations."""
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
    """A plain descent step, and the gradients forgotten."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= rate * parameter.grad
            parameter.grad = None


# --- forward ----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    "convolution",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel_size", [1, 3, (2, 3)], ids=str)
def test_forward_is_a_convolution_with_d(projections, levels, forward, convolution, kernel_size):
    torch.manual_seed(0)
    layer = ProjectionConv2d(
        IN, OUT, kernel_size, projections=projections, levels=levels, projection_forward=forward, **convolution
    ).double()
    x = torch.randn(2, IN, 9, 8, dtype=torch.float64)
    expected = reference.quantize(layer.weight, layer.projection, levels=levels, projection_forward=forward)
    torch.testing.assert_close(layer.quantized_weight(), expected, **EXACT)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected, **convolution), **EXACT)


def test_forward_takes_the_input_as_it_is():
    layer = make_layer()
    x, _ = draw_batch()
    assert not torch.allclose(layer(x), layer(x.sign()))


@pytest.mark.parametrize(("projections", "expected"), [(1, "mean"), (2, "full"), (4, "full")])
def test_default_forward_is_the_mean_for_one_projection_and_full_for_more(projections, expected):
    layer = make_layer(projections=projections)
    by_mean, by_full = (
        reference.quantize(layer.weight, layer.projection, projection_forward=forward) for forward in ("mean", "full")
    )
    assert not torch.equal(by_mean, by_full)
    torch.testing.assert_close(layer.quantized_weight(), by_mean if expected == "mean" else by_full, **EXACT)
    assert layer.projection_forward == expected


def test_shapes_and_state_are_the_contract():
    layer = ProjectionConv2d(3, 8, (2, 3), projections=4)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (2, 3, 2, 3),
        "projection": (4, 2, 3),
    }
    assert dict(layer.named_parameters()).keys() == {"weight", "projection"}
    assert layer.quantized_weight().shape == (8, 3, 2, 3)


def test_state_has_the_same_keys_in_the_middle_of_a_step():
    layer = make_layer(eta=ETA)
    layer.sum_step_gradients()
    layer(draw_batch()[0]).sum().backward()
    assert layer.state_dict().keys() == {"weight", "projection"}


def test_quantized_weight_is_detached():
    assert not make_layer().quantized_weight().requires_grad


@pytest.mark.parametrize("gradient", ["clip", "polynomial"])
def test_sign_activation_binarises_with_the_gradient_it_was_given(gradient):
    x = torch.tensor([-1.5, -0.25, 0.0, 0.5, 1.0], requires_grad=True)
    signs = SignActivation(gradient)(x)
    signs.sum().backward()
    assert signs.tolist() == [-1, -1, 1, 1, 1]
    assert x.grad.tolist() == {"clip": [0, 1, 1, 1, 1], "polynomial": [0, 1.5, 2, 1, 0]}[gradient]


# --- gradients --------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("scale", [1.0, 4096.0])
@pytest.mark.parametrize("summed", [False, True])
def test_one_backward_leaves_the_gradients_of_the_equations(projections, levels, forward, eta, scale, summed):
    layer = make_layer(projections=projections, levels=levels, projection_forward=forward, eta=eta)
    x, target = draw_batch()
    expected = reference_gradients(layer, x, target, scale)
    if summed:
        layer.sum_step_gradients()
    (scale * (task_loss(layer(x), target) + layer.projection_loss())).backward()
    if summed:
        for parameter in layer.parameters():
            parameter.grad /= scale
        layer.add_eta_square()
        for parameter in layer.parameters():
            parameter.grad *= scale
    assert_gradients(layer, expected)


@pytest.mark.parametrize("levels", ["binary", "ternary"])
def test_every_term_of_the_reference_matters(levels):
    # Guards the tests above: were η, λ or the indicator to have no weight there, they could not see it.
    layer = make_layer(levels=levels, eta=ETA)
    x, target = draw_batch()
    exact = reference_gradients(layer, x, target)
    no_eta = reference_gradients(layer, x, target, eta=0.0)
    layer.projection_loss_weight = 0.0
    no_loss = reference_gradients(layer, x, target)
    for gradient, without_eta, without_loss in zip(exact, no_eta, no_loss, strict=True):
        assert (gradient - without_eta).norm() > 0.02 * gradient.norm()
        assert (gradient - without_loss).norm() > 0.02 * gradient.norm()


@pytest.mark.parametrize(("projections", "levels"), [(1, "binary"), (4, "binary"), (4, "ternary")])
@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("scale", [1.0, 4096.0])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_add_up_to_the_whole_batch_step_after_step(projections, levels, eta, scale, micro_batches):
    layer = make_layer(projections=projections, levels=levels, eta=eta)
    if eta > 0:
        layer.sum_step_gradients()
    for step in range(3):
        x, target = draw_batch(seed=step)
        expected = reference_gradients(layer, x, target)
        for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
            loss = (task_loss(layer(part), wanted) + layer.projection_loss()) / micro_batches
            (scale * loss).backward()
        for parameter in layer.parameters():
            parameter.grad /= scale
        layer.add_eta_square()
        assert_gradients(layer, expected)
        update(layer)


def test_loss_scale_may_differ_from_step_to_step():
    layer = make_layer(eta=ETA)
    layer.sum_step_gradients()
    for step, scale in enumerate([65536.0, 2.0, 0.125]):
        x, target = draw_batch(seed=step)
        expected = reference_gradients(layer, x, target)
        (scale * (task_loss(layer(x), target) + layer.projection_loss())).backward()
        for parameter in layer.parameters():
            parameter.grad /= scale
        layer.add_eta_square()
        assert_gradients(layer, expected)
        update(layer)


def test_asking_anew_to_sum_forgets_a_step_that_was_given_up():
    layer = make_layer(eta=ETA)
    layer.sum_step_gradients()
    (task_loss(layer(draw_batch(5)[0]), draw_batch(5)[1]) + layer.projection_loss()).backward()
    layer.zero_grad()
    layer.sum_step_gradients()
    x, target = draw_batch()
    (task_loss(layer(x), target) + layer.projection_loss()).backward()
    layer.add_eta_square()
    assert_gradients(layer, reference_gradients(layer, x, target))


@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("summed", [False, True])
def test_without_the_projection_loss_only_the_task_part_is_left(eta, summed):
    layer = make_layer(eta=eta)
    x, target = draw_batch()
    if summed:
        layer.sum_step_gradients()
    task_loss(layer(x), target).backward()
    layer.add_eta_square()
    layer.projection_loss_weight = 0.0
    assert_gradients(layer, reference_gradients(layer, x, target, eta=0.0))


@every_kind
@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_projection_loss_alone_is_the_plain_residual(projections, levels, forward, eta, after_forward, summed):
    layer = make_layer(projections=projections, levels=levels, projection_forward=forward, eta=eta)
    quantized = reference.quantize(layer.weight, layer.projection, levels=levels, projection_forward=forward)
    no_delta = torch.zeros_like(quantized)
    if summed:
        layer.sum_step_gradients()
    if after_forward:
        layer(draw_batch()[0])
    loss = layer.projection_loss()
    loss.backward()
    layer.add_eta_square()
    expected = reference.projection_loss(layer.weight, layer.projection, quantized, LAMBDA)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert_gradients(
        layer, reference.gradients(layer.weight, layer.projection, quantized, no_delta, loss_weight=LAMBDA)
    )


def test_projection_loss_has_the_same_value_wherever_it_is_taken():
    layer = make_layer(eta=ETA)
    before = layer.projection_loss()
    layer(draw_batch()[0])
    of_forward, again = layer.projection_loss(), layer.projection_loss()
    with torch.no_grad():
        layer(draw_batch()[0])
        without_gradient = layer.projection_loss()
    layer.eval()
    layer(draw_batch()[0])
    assert before == of_forward == again == without_gradient == layer.projection_loss()
    assert not without_gradient.requires_grad


def double_the_kernels(layer):
    """Doubles C, and with it D; the loss becomes four times what it was."""
    with torch.no_grad():
        layer.weight *= 2


def test_projection_loss_is_handed_out_once_and_then_of_the_kernels_as_they_are():
    layer = make_layer()
    layer(draw_batch()[0])
    of_forward = layer.projection_loss()
    double_the_kernels(layer)
    assert layer.projection_loss().item() == pytest.approx(4 * of_forward.item())


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_without_training_or_gradient_keeps_no_loss(training):
    layer = make_layer().train(training)
    before = layer.projection_loss()
    with torch.set_grad_enabled(not training):
        layer(draw_batch()[0])
    double_the_kernels(layer)
    assert layer.projection_loss().item() == pytest.approx(4 * before.item())


def test_projection_loss_read_without_gradient_has_none():
    layer = make_layer()
    layer(draw_batch()[0])
    with torch.no_grad():
        assert not layer.projection_loss().requires_grad


@pytest.mark.parametrize("look", ["forward", "quantized_weight", "projection_loss"])
def test_looking_without_gradient_between_forward_and_loss_changes_no_gradient(look):
    layer = make_layer(eta=ETA)
    x, target = draw_batch()
    y = layer(x)
    with torch.no_grad():
        layer(x) if look == "forward" else getattr(layer, look)()
    (task_loss(y, target) + layer.projection_loss()).backward()
    assert_gradients(layer, reference_gradients(layer, x, target))


def test_a_layer_called_twice_in_one_forward_adds_both_task_gradients_at_eta_zero():
    layer = make_layer(eta=0.0)
    (x, target), (other_x, other_target) = draw_batch(1), draw_batch(2)
    loss = task_loss(layer(x), target) + task_loss(layer(other_x), other_target) + layer.projection_loss()
    loss.backward()
    both = reference_gradients(layer, x, target)
    layer.projection_loss_weight = 0.0
    second_task = reference_gradients(layer, other_x, other_target)
    assert_gradients(layer, [one + two for one, two in zip(both, second_task, strict=True)])


def test_gradient_of_the_input_is_that_of_a_convolution_with_d():
    layer = make_layer(eta=ETA)
    x, target = draw_batch()
    x.requires_grad_()
    (task_loss(layer(x), target) + layer.projection_loss()).backward()
    leaf = x.detach().clone().requires_grad_()
    quantized = reference.quantize(layer.weight, layer.projection)
    task_loss(F.conv2d(leaf, quantized, **CONVOLUTION), target).backward()
    torch.testing.assert_close(x.grad, leaf.grad, **EXACT)


def test_frozen_projection_leaves_the_gradient_of_the_kernels_as_it_is():
    layer = make_layer(eta=ETA)
    x, target = draw_batch()
    expected, _ = reference_gradients(layer, x, target)
    layer.projection.requires_grad_(False)
    layer.sum_step_gradients()
    (task_loss(layer(x), target) + layer.projection_loss()).backward()
    layer.add_eta_square()
    torch.testing.assert_close(layer.weight.grad, expected, **EXACT)
    assert layer.projection.grad is None


@pytest.mark.parametrize("projections", [1, 4])
def test_descent_on_the_projection_loss_gathers_c_at_its_mean_magnitude(projections):
    layer = ProjectionConv2d(
        4, 8, 3, projections=projections, projection_init="ones", projection_loss_weight=1.0
    ).double()
    before = layer.weight.detach().clone()
    scale = before.abs().mean()
    for _ in range(200):
        (gradient,) = torch.autograd.grad(layer.projection_loss(), layer.weight)
        with torch.no_grad():
            layer.weight -= 0.1 / projections * gradient
        torch.testing.assert_close(layer.weight.abs().mean(), scale, **EXACT)
    torch.testing.assert_close(layer.weight.detach(), scale * before.sign(), rtol=1e-6, atol=1e-6)


# --- two processes ----------------------------------------------------------------------------------------------

TWO_PROCESS_CASES = [
    {"levels": "binary", "eta": ETA},
    {"levels": "ternary", "eta": ETA, "projections": 1},
    {"levels": "binary", "eta": 0.0},
]


def train_on_half_of_each_batch(rank):
    """Two steps of each case, each of two micro-batches of this process's half; returns the gradients."""
    gradients = {}
    for case, arguments in enumerate(TWO_PROCESS_CASES):
        layer = make_layer(**arguments)
        if layer.eta > 0:
            layer.sum_step_gradients()
        network = DistributedDataParallel(nn.Sequential(layer))
        for step in range(2):
            x, target = (part.chunk(2)[rank].chunk(2) for part in draw_batch(seed=step, batch=8))
            for last, (part, wanted) in enumerate(zip(x, target, strict=True)):
                with nullcontext() if last else network.no_sync():
                    ((task_loss(network(part), wanted) + layer.projection_loss()) / 2).backward()
            layer.add_eta_square()
            for name, parameter in layer.named_parameters():
                gradients[f"{case}.{step}.{name}"] = parameter.grad.clone()
            update(layer)
    return gradients


def test_two_processes_leave_the_gradients_of_the_whole_batch(tmp_path):
    both = reference.on_two_processes(train_on_half_of_each_batch, tmp_path)
    for case, arguments in enumerate(TWO_PROCESS_CASES):
        layer = make_layer(**arguments)
        for step in range(2):
            expected = reference_gradients(layer, *draw_batch(seed=step, batch=8))
            for gradients in both:
                for name, parameter in layer.named_parameters():
                    parameter.grad = gradients[f"{case}.{step}.{name}"]
                assert_gradients(layer, expected)
            update(layer)


# --- precision --------------------------------------------------------------------------------------------------


@every_kind
def test_float32_gradients_are_near_the_equations(projections, levels, forward):
    layer = make_layer(dtype=torch.float32, projections=projections, levels=levels, projection_forward=forward, eta=ETA)
    x, target = draw_batch(dtype=torch.float32)
    (task_loss(layer(x), target) + layer.projection_loss()).backward()
    assert layer.weight.grad.dtype == layer.projection.grad.dtype == torch.float32
    assert_gradients(layer, reference_gradients(layer, x, target), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("summed", [False, True])
def test_bfloat16_autocast_convolves_in_half_and_keeps_loss_and_gradients_in_float32(eta, summed):
    layer = make_layer(dtype=torch.float32, eta=eta)
    x, target = draw_batch(dtype=torch.float32)
    x = x.bfloat16().float()  # exact in either precision
    exact_loss = layer.projection_loss()
    if summed:
        layer.sum_step_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        loss = layer.projection_loss()
        total = task_loss(y.float(), target) + loss
    total.backward()
    layer.add_eta_square()
    assert y.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss == exact_loss
    assert layer.weight.grad.dtype == layer.projection.grad.dtype == torch.float32
    # 8 bits of mantissa in D, y and δ
    for parameter, formula in zip(layer.parameters(), reference_gradients(layer, x, target), strict=True):
        assert (parameter.grad - formula).norm() < 0.02 * formula.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_layer_has_a_float32_loss(dtype):
    layer = make_layer(dtype=dtype, eta=ETA)
    exact = reference.projection_loss(
        layer.weight, layer.projection, reference.quantize(layer.weight, layer.projection), LAMBDA
    )
    x, target = draw_batch(dtype=dtype)
    y = layer(x)
    loss = layer.projection_loss()
    (task_loss(y.float(), target.float()) + loss).backward()
    assert y.dtype == layer.weight.grad.dtype == layer.projection.grad.dtype == dtype
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.02)
    assert layer.projection.grad.isfinite().all()


# --- compilation ------------------------------------------------------------------------------------------------


def compiled_gradients_are_the_equations(backend, dtype, summed, loss_inside, **tolerance):
    """Binary, then ternary, then binary again: assigning ``levels`` is to be seen by the compiled graph."""
    torch._dynamo.reset()
    layer = make_layer(dtype=dtype, levels="binary", eta=ETA)
    network = nn.Sequential(SignActivation(), layer)

    def total_loss(x, target):
        return task_loss(network(x), target) + layer.projection_loss()

    if summed:
        layer.sum_step_gradients()
    compiled = torch.compile(total_loss if loss_inside else network, fullgraph=True, backend=backend)
    for step, levels in enumerate(["binary", "ternary", "binary"]):
        layer.levels = levels
        x, target = draw_batch(seed=step, dtype=dtype)
        expected = reference_gradients(layer, reference.sign(x), target)
        loss = compiled(x, target) if loss_inside else task_loss(compiled(x), target) + layer.projection_loss()
        loss.backward()
        layer.add_eta_square()
        assert_gradients(layer, expected, **tolerance)
        update(layer)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("loss_inside", [False, True])
def test_compiled_without_graph_breaks_the_gradients_are_the_same(summed, loss_inside):
    compiled_gradients_are_the_equations("aot_eager", torch.float64, summed, loss_inside, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("summed", [False, True])
def test_inductor_leaves_the_same_gradients(summed):
    compiled_gradients_are_the_equations("inductor", torch.float32, summed, False, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", ["clip", "polynomial"])
def test_compiled_sign_activation_has_its_gradient(gradient):
    torch._dynamo.reset()
    x = torch.tensor([-1.5, -1.0, -0.25, -0.0, 0.0, 0.5, 1.0, math.nan], requires_grad=True)
    signs = torch.compile(SignActivation(gradient), fullgraph=True, backend="aot_eager")(x)
    signs[:-1].sum().backward()
    assert signs[:-1].tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert signs[-1].isnan()
    assert x.grad[:-1].tolist() == {"clip": [0, 1, 1, 1, 1, 1, 1], "polynomial": [0, 0, 1.5, 2, 2, 1, 0]}[gradient]


def test_compiled_inference_is_the_eager_one():
    torch._dynamo.reset()
    layer = make_layer().eval()
    network = nn.Sequential(SignActivation(), layer)
    x, _ = draw_batch()
    with torch.no_grad():
        y = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    quantized = reference.quantize(layer.weight, layer.projection)
    torch.testing.assert_close(y, F.conv2d(reference.sign(x), quantized, **CONVOLUTION), **EXACT)


# --- initial values ---------------------------------------------------------------------------------------------


def many_projections(projection_init):
    torch.manual_seed(0)
    layer = ProjectionConv2d(1, 4096, 3, projections=4096, projection_init=projection_init)
    return layer.projection.detach().flatten()  # 36,864 numbers


@pytest.mark.parametrize(("projection_init", "mean", "deviation"), [("normal", 0.0, 1.0), ("near_one", 1.0, 0.1)])
def test_gaussian_projections(projection_init, mean, deviation):
    drawn = (many_projections(projection_init) - mean) / deviation
    assert drawn.mean().item() == pytest.approx(0, abs=0.03)
    assert drawn.std().item() == pytest.approx(1, abs=0.03)
    assert (drawn.abs() <= 1).double().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.02)


def test_sign_projections_are_both_signs_equally_often():
    drawn = many_projections("signs")
    assert drawn.unique().tolist() == [-1, 1]
    assert drawn.mean().item() == pytest.approx(0, abs=0.03)


def test_one_projections():
    assert many_projections("ones").unique().tolist() == [1]


def test_kernels_have_unit_gain_for_their_fan_in():
    torch.manual_seed(0)
    weight = ProjectionConv2d(16, 256, 3, projections=4).weight.detach()
    assert weight.mean().item() == pytest.approx(0, abs=0.01)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.05)


@pytest.mark.parametrize("projection_init", ["normal", "signs", "near_one", "ones"])
def test_reset_projection_is_the_same_for_the_same_generator(projection_init):
    first, second = (make_layer(seed, projection_init=projection_init) for seed in (0, 1))
    kernels = first.weight.detach().clone()
    global_state = torch.get_rng_state()
    first.reset_projection(torch.Generator().manual_seed(7))
    second.reset_projection(torch.Generator().manual_seed(7))
    assert torch.equal(first.projection, second.projection)
    assert torch.equal(first.weight, kernels)
    assert torch.equal(torch.get_rng_state(), global_state)
    first.reset_projection(torch.Generator().manual_seed(8))
    assert torch.equal(first.projection, second.projection) == (projection_init == "ones")


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"groups": 2}, ["groups", "1", "2"]),
        ({"out_channels": 6, "projections": 4}, ["projections", "out_channels=6", "4"]),
        ({"projections": 0}, ["projections", "0", "at least 1"]),
        ({"in_channels": 0}, ["in_channels", "0", "at least 1"]),
        ({"out_channels": 0}, ["out_channels", "0", "at least 1"]),
        ({"kernel_size": 0}, ["kernel_size", "0", "at least 1"]),
        ({"kernel_size": (3, 0)}, ["kernel_size", "0", "at least 1"]),
        ({"levels": "quaternary"}, ["levels", "'quaternary'", "binary", "ternary"]),
        ({"projection_forward": "half"}, ["projection_forward", "'half'", "full", "mean"]),
        ({"projection_init": "zeros"}, ["projection_init", "'zeros'", "normal", "signs", "near_one", "ones"]),
        ({"sigma": 0.0}, ["sigma", "0.0", "positive"]),
        ({"sigma": -0.7}, ["sigma", "-0.7", "positive"]),
        ({"sigma": math.nan}, ["sigma", "nan", "positive"]),
        ({"sigma": math.inf}, ["sigma", "inf", "positive"]),
        ({"projection_loss_weight": -1e-4}, ["projection_loss_weight", "-0.0001", "at least 0"]),
        ({"projection_loss_weight": math.nan}, ["projection_loss_weight", "nan", "at least 0"]),
        ({"projection_loss_weight": math.inf}, ["projection_loss_weight", "inf", "at least 0"]),
        ({"eta": -0.5}, ["eta", "-0.5", "at least 0"]),
        ({"eta": math.nan}, ["eta", "nan", "at least 0"]),
        ({"eta": math.inf}, ["eta", "inf", "at least 0"]),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_with_their_value_and_what_is_allowed(arguments, parts):
    correct = {"in_channels": 3, "out_channels": 8, "kernel_size": 3}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked part by part
        ProjectionConv2d(**{**correct, **arguments})
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_sign_activation_refuses_an_unknown_gradient():
    with pytest.raises(ValueError, match=r"gradient must be one of clip, polynomial, but got 'steep'"):
        SignActivation("steep")


def test_assigning_unknown_levels_is_refused_and_leaves_the_old():
    layer = make_layer(levels="ternary")
    with pytest.raises(ValueError, match=r"levels must be one of binary, ternary, but got 'quaternary'"):
        layer.levels = "quaternary"
    assert layer.levels == "ternary"


def test_assigned_levels_are_used_by_the_next_forward():
    layer = make_layer(levels="ternary")
    x, _ = draw_batch()
    layer.levels = "binary"
    expected = reference.quantize(layer.weight, layer.projection, levels="binary")
    torch.testing.assert_close(layer(x), F.conv2d(x, expected, **CONVOLUTION), **EXACT)


@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (2, 2, 7, 6), (7, 6), (1, 2, 3, 7, 6)], ids=str)
def test_forward_refuses_other_input_channels(shape):
    with pytest.raises(ValueError, match=r"in_channels=3") as error:
        make_layer()(torch.zeros(shape, dtype=torch.float64))
    assert str(shape) in str(error.value)


# --- copies -----------------------------------------------------------------------------------------------------


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("summed", [False, True])
def test_a_copy_made_between_forward_and_backward_trains_on_its_own(duplicate, summed):
    layer = make_layer(levels="ternary", eta=ETA)
    if summed:
        layer.sum_step_gradients()
    x, target = draw_batch()
    y = layer(x)
    twin = duplicate(layer)
    assert twin.levels == "ternary"
    assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(twin.projection, layer.projection)

    expected = reference_gradients(layer, x, target)
    (task_loss(twin(x), target) + twin.projection_loss()).backward()
    assert_gradients(twin, expected)
    assert layer.weight.grad is None
    (task_loss(y, target) + layer.projection_loss()).backward()
    layer.add_eta_square()
    assert_gradients(layer, expected)
