"""``ProjectionConv2d`` in training loops: accumulation, loss scales, processes, precision, compilation, copies."""

from contextlib import nullcontext

import pytest
import reference
import torch
import torch.nn.functional as F
from projection_layers import (
    CONVOLUTION,
    ETA,
    LAMBDA,
    assert_gradients,
    draw_batch,
    every_kind,
    make_layer,
    reference_gradients,
    task_loss,
    update,
)
from reference import EXACT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pcnn_lightning.layers import SignActivation

# --- steps of several backward passes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("projections", "stage"), [(1, "binary"), (4, "binary"), (4, "ternary")])
@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("scale", [1.0, 4096.0])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_add_up_to_the_whole_batch_step_after_step(projections, stage, eta, scale, micro_batches):
    layer = make_layer(projections=projections, stage=stage, eta=eta)
    if eta > 0:
        layer.begin_training(split_updates=True)
    for step in range(3):
        x, target = draw_batch(seed=step)
        expected = reference_gradients(layer, x, target)
        for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
            loss = (task_loss(layer(part), wanted) + layer.quantization_loss()) / micro_batches
            (scale * loss).backward()
        for parameter in layer.parameters():
            parameter.grad /= scale
        layer.before_step()
        assert_gradients(layer, expected)
        update(layer)


@pytest.mark.parametrize("normalization", ["center", "standardize"])
@pytest.mark.parametrize(("projections", "stage"), [(1, "binary"), (4, "binary"), (4, "ternary")])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_normalized_filters_have_the_gradients_of_the_equations_behind_the_normalization(
    normalization, projections, stage, micro_batches
):
    layer = make_layer(projections=projections, stage=stage, eta=ETA, normalization=normalization)
    layer.weight.data += 0.5  # so that there is a mean to subtract
    if micro_batches > 1:
        layer.begin_training(split_updates=True)
    for step in range(2):
        x, target = draw_batch(seed=step)
        weight = layer.weight.detach().clone().requires_grad_()
        filters = reference.normalize(weight, normalization)
        options = {"levels": layer.levels, "projection_forward": layer.projection_forward}
        quantized = reference.quantize(filters, layer.projection, **options)
        torch.testing.assert_close(layer.quantized_weight(), quantized, **EXACT)
        loss = reference.projection_loss(filters, layer.projection, quantized, LAMBDA)
        assert layer.quantization_loss().item() == pytest.approx(loss, rel=1e-9)
        delta = reference.task_gradient(lambda y, wanted=target: task_loss(y, wanted), x, quantized, **CONVOLUTION)
        by_filters, by_projection = reference.gradients(
            filters, layer.projection, quantized, delta, loss_weight=LAMBDA, eta=ETA
        )
        (by_weight,) = torch.autograd.grad(filters, weight, by_filters)
        for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
            ((task_loss(layer(part), wanted) + layer.quantization_loss()) / micro_batches).backward()
        layer.before_step()
        assert_gradients(layer, (by_weight, by_projection))
        update(layer)


def test_loss_scale_may_differ_from_step_to_step():
    layer = make_layer(eta=ETA)
    layer.begin_training(split_updates=True)
    for step, scale in enumerate([65536.0, 2.0, 0.125]):
        x, target = draw_batch(seed=step)
        expected = reference_gradients(layer, x, target)
        (scale * (task_loss(layer(x), target) + layer.quantization_loss())).backward()
        for parameter in layer.parameters():
            parameter.grad /= scale
        layer.before_step()
        assert_gradients(layer, expected)
        update(layer)


def test_sum_step_gradients_discards_an_abandoned_step():
    layer = make_layer(eta=ETA)
    layer.begin_training(split_updates=True)
    (task_loss(layer(draw_batch(5)[0]), draw_batch(5)[1]) + layer.quantization_loss()).backward()
    layer.zero_grad()
    layer.begin_training(split_updates=True)
    x, target = draw_batch()
    (task_loss(layer(x), target) + layer.quantization_loss()).backward()
    layer.before_step()
    assert_gradients(layer, reference_gradients(layer, x, target))


# --- two processes --------------------------------------------------------------------------------------------------


TWO_PROCESS_CASES = [
    {"stage": "binary", "eta": ETA},
    {"stage": "ternary", "eta": ETA, "projections": 1},
    {"stage": "binary", "eta": 0.0},
]


def train_on_half_of_each_batch(rank):
    """The gradients of two steps of each case, on two micro-batches of this process's half of the batch."""
    gradients = {}
    for case, arguments in enumerate(TWO_PROCESS_CASES):
        layer = make_layer(**arguments)
        if layer.eta > 0:
            layer.begin_training(split_updates=True)
        network = DistributedDataParallel(nn.Sequential(layer))
        for step in range(2):
            x, target = (part.chunk(2)[rank].chunk(2) for part in draw_batch(seed=step, batch=8))
            for last, (part, wanted) in enumerate(zip(x, target, strict=True)):
                with nullcontext() if last else network.no_sync():
                    ((task_loss(network(part), wanted) + layer.quantization_loss()) / 2).backward()
            layer.before_step()
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


# --- precision ------------------------------------------------------------------------------------------------------


@every_kind
def test_float32_gradients_are_near_the_equations(projections, stage, forward):
    layer = make_layer(dtype=torch.float32, projections=projections, stage=stage, projection_forward=forward, eta=ETA)
    x, target = draw_batch(dtype=torch.float32)
    (task_loss(layer(x), target) + layer.quantization_loss()).backward()
    assert layer.weight.grad.dtype == layer.projection.grad.dtype == torch.float32
    assert_gradients(layer, reference_gradients(layer, x, target), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("summed", [False, True])
def test_bfloat16_autocast_convolves_in_half_and_keeps_loss_and_gradients_in_float32(eta, summed):
    layer = make_layer(dtype=torch.float32, eta=eta)
    x, target = draw_batch(dtype=torch.float32)
    x = x.bfloat16().float()  # exact in either precision
    exact_loss = layer.quantization_loss()
    if summed:
        layer.begin_training(split_updates=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        loss = layer.quantization_loss()
        total = task_loss(y.float(), target) + loss
    total.backward()
    layer.before_step()
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
    loss = layer.quantization_loss()
    (task_loss(y.float(), target.float()) + loss).backward()
    assert y.dtype == layer.weight.grad.dtype == layer.projection.grad.dtype == dtype
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.02)
    assert layer.projection.grad.isfinite().all()


# --- compilation ----------------------------------------------------------------------------------------------------


def check_compiled_gradients(backend, dtype, summed, loss_inside, **tolerance):
    """Binary, ternary and binary again: the compiled graph must notice that ``levels`` changed."""
    torch._dynamo.reset()
    layer = make_layer(dtype=dtype, stage="binary", eta=ETA)
    network = nn.Sequential(SignActivation(), layer)

    def total_loss(x, target):
        return task_loss(network(x), target) + layer.quantization_loss()

    if summed:
        layer.begin_training(split_updates=True)
    compiled = torch.compile(total_loss if loss_inside else network, fullgraph=True, backend=backend)
    for step, levels in enumerate(["binary", "ternary", "binary"]):
        layer.set_stage(levels)
        x, target = draw_batch(seed=step, dtype=dtype)
        expected = reference_gradients(layer, reference.sign(x), target)
        loss = compiled(x, target) if loss_inside else task_loss(compiled(x), target) + layer.quantization_loss()
        loss.backward()
        layer.before_step()
        assert_gradients(layer, expected, **tolerance)
        update(layer)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("loss_inside", [False, True])
def test_compiled_gradients(summed, loss_inside):
    check_compiled_gradients("aot_eager", torch.float64, summed, loss_inside, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("summed", [False, True])
def test_inductor_gradients(summed):
    check_compiled_gradients("inductor", torch.float32, summed, False, rtol=1e-4, atol=1e-4)


def test_compiled_inference_is_the_eager_one():
    torch._dynamo.reset()
    layer = make_layer().eval()
    network = nn.Sequential(SignActivation(), layer)
    x, _ = draw_batch()
    with torch.no_grad():
        y = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    quantized = reference.quantize(layer.weight, layer.projection)
    torch.testing.assert_close(y, F.conv2d(reference.sign(x), quantized, **CONVOLUTION), **EXACT)


# --- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("summed", [False, True])
def test_copy_between_forward_and_backward_trains_on_its_own(duplicate, summed):
    layer = make_layer(stage="ternary", eta=ETA)
    if summed:
        layer.begin_training(split_updates=True)
    x, target = draw_batch()
    y = layer(x)
    twin = duplicate(layer)
    assert twin.stage == "ternary"
    assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(twin.projection, layer.projection)

    expected = reference_gradients(layer, x, target)
    (task_loss(twin(x), target) + twin.quantization_loss()).backward()
    assert_gradients(twin, expected)
    assert layer.weight.grad is None
    (task_loss(y, target) + layer.quantization_loss()).backward()
    layer.before_step()
    assert_gradients(layer, expected)
