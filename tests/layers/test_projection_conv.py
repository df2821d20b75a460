"""``ProjectionConv2d``: kernels, gradients, initial values and arguments."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from projection_layers import (
    CONVOLUTION,
    ETA,
    IN,
    LAMBDA,
    LEVELS,
    OUT,
    assert_gradients,
    draw_batch,
    every_kind,
    make_layer,
    reference_gradients,
    task_loss,
)
from reference import EXACT

from pcnn_lightning.layers import ProjectionConv2d

# --- forward --------------------------------------------------------------------------------------------------------


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
def test_forward_is_a_convolution_with_d(projections, stage, forward, convolution, kernel_size):
    torch.manual_seed(0)
    layer = ProjectionConv2d(
        IN, OUT, kernel_size, projections=projections, stage=stage, projection_forward=forward, **convolution
    ).double()
    x = torch.randn(2, IN, 9, 8, dtype=torch.float64)
    expected = reference.quantize(layer.weight, layer.projection, levels=LEVELS[stage], projection_forward=forward)
    torch.testing.assert_close(layer.quantized_weight(), expected, **EXACT)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected, **convolution), **EXACT)


@pytest.mark.parametrize(("projections", "expected"), [(1, "mean"), (2, "full"), (4, "full")])
def test_default_forward_is_the_mean_for_one_projection_and_full_for_more(projections, expected):
    layer = make_layer(projections=projections)
    by_mean, by_full = (
        reference.quantize(layer.weight, layer.projection, projection_forward=forward) for forward in ("mean", "full")
    )
    assert not torch.equal(by_mean, by_full)
    torch.testing.assert_close(layer.quantized_weight(), by_mean if expected == "mean" else by_full, **EXACT)
    assert layer.projection_forward == expected


def test_parameter_shapes_and_state_dict():
    layer = ProjectionConv2d(3, 8, (2, 3), projections=4)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (2, 3, 2, 3),
        "projection": (4, 2, 3),
    }
    assert dict(layer.named_parameters()).keys() == {"weight", "projection"}
    assert layer.quantized_weight().shape == (8, 3, 2, 3)


def test_state_dict_keys_do_not_change_within_a_step():
    layer = make_layer(eta=ETA)
    layer.begin_training(split_updates=True)
    layer(draw_batch()[0]).sum().backward()
    assert layer.state_dict().keys() == {"weight", "projection"}


def test_quantized_weight_is_detached():
    assert not make_layer().quantized_weight().requires_grad


def test_an_unknown_stage_is_refused():
    layer = make_layer(stage="ternary")
    with pytest.raises(ValueError, match=r"stage must be one of real, ternary, binary, but got 'quaternary'"):
        layer.set_stage("quaternary")
    assert (layer.stage, layer.levels) == ("ternary", 3)


def test_a_new_stage_is_used_by_the_next_forward():
    layer = make_layer(stage="ternary")
    x, _ = draw_batch()
    layer.set_stage("binary")
    expected = reference.quantize(layer.weight, layer.projection, levels=2)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected, **CONVOLUTION), **EXACT)


# --- gradients ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("scale", [1.0, 4096.0])
@pytest.mark.parametrize("summed", [False, True])
def test_one_backward_leaves_the_gradients_of_the_equations(projections, stage, forward, eta, scale, summed):
    layer = make_layer(projections=projections, stage=stage, projection_forward=forward, eta=eta)
    x, target = draw_batch()
    expected = reference_gradients(layer, x, target, scale)
    if summed:
        layer.begin_training(split_updates=True)
    (scale * (task_loss(layer(x), target) + layer.quantization_loss())).backward()
    if summed:
        for parameter in layer.parameters():
            parameter.grad /= scale
        layer.before_step()
        for parameter in layer.parameters():
            parameter.grad *= scale
    assert_gradients(layer, expected)


@pytest.mark.parametrize("stage", ["binary", "ternary"])
def test_every_term_of_the_reference_matters(stage):
    # Without this the tests above could not notice a missing η, λ or indicator.
    layer = make_layer(stage=stage, eta=ETA)
    x, target = draw_batch()
    exact = reference_gradients(layer, x, target)
    no_eta = reference_gradients(layer, x, target, eta=0.0)
    layer.projection_loss_weight = 0.0
    no_loss = reference_gradients(layer, x, target)
    for gradient, without_eta, without_loss in zip(exact, no_eta, no_loss, strict=True):
        assert (gradient - without_eta).norm() > 0.02 * gradient.norm()
        assert (gradient - without_loss).norm() > 0.02 * gradient.norm()


@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("summed", [False, True])
def test_gradients_of_the_task_loss_alone(eta, summed):
    layer = make_layer(eta=eta)
    x, target = draw_batch()
    if summed:
        layer.begin_training(split_updates=True)
    task_loss(layer(x), target).backward()
    layer.before_step()
    layer.projection_loss_weight = 0.0
    assert_gradients(layer, reference_gradients(layer, x, target, eta=0.0))


@every_kind
@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_gradients_of_the_projection_loss_alone(projections, stage, forward, eta, after_forward, summed):
    layer = make_layer(projections=projections, stage=stage, projection_forward=forward, eta=eta)
    quantized = reference.quantize(layer.weight, layer.projection, levels=LEVELS[stage], projection_forward=forward)
    no_delta = torch.zeros_like(quantized)
    if summed:
        layer.begin_training(split_updates=True)
    if after_forward:
        layer(draw_batch()[0])
    loss = layer.quantization_loss()
    loss.backward()
    layer.before_step()
    expected = reference.projection_loss(layer.weight, layer.projection, quantized, LAMBDA)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert_gradients(
        layer, reference.gradients(layer.weight, layer.projection, quantized, no_delta, loss_weight=LAMBDA)
    )


@pytest.mark.parametrize("call", ["forward", "quantized_weight", "quantization_loss"])
def test_no_grad_calls_between_forward_and_loss_do_not_change_gradients(call):
    layer = make_layer(eta=ETA)
    x, target = draw_batch()
    y = layer(x)
    with torch.no_grad():
        layer(x) if call == "forward" else getattr(layer, call)()
    (task_loss(y, target) + layer.quantization_loss()).backward()
    assert_gradients(layer, reference_gradients(layer, x, target))


def test_a_layer_called_twice_in_one_forward_adds_both_task_gradients_at_eta_zero():
    layer = make_layer(eta=0.0)
    (x, target), (other_x, other_target) = draw_batch(1), draw_batch(2)
    loss = task_loss(layer(x), target) + task_loss(layer(other_x), other_target) + layer.quantization_loss()
    loss.backward()
    both = reference_gradients(layer, x, target)
    layer.projection_loss_weight = 0.0
    second_task = reference_gradients(layer, other_x, other_target)
    assert_gradients(layer, [one + two for one, two in zip(both, second_task, strict=True)])


def test_gradient_of_the_input_is_that_of_a_convolution_with_d():
    layer = make_layer(eta=ETA)
    x, target = draw_batch()
    x.requires_grad_()
    (task_loss(layer(x), target) + layer.quantization_loss()).backward()
    leaf = x.detach().clone().requires_grad_()
    quantized = reference.quantize(layer.weight, layer.projection)
    task_loss(F.conv2d(leaf, quantized, **CONVOLUTION), target).backward()
    torch.testing.assert_close(x.grad, leaf.grad, **EXACT)


def test_freezing_the_projection_does_not_change_the_gradient_of_the_kernels():
    layer = make_layer(eta=ETA)
    x, target = draw_batch()
    expected, _ = reference_gradients(layer, x, target)
    layer.projection.requires_grad_(False)
    layer.begin_training(split_updates=True)
    (task_loss(layer(x), target) + layer.quantization_loss()).backward()
    layer.before_step()
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
        (gradient,) = torch.autograd.grad(layer.quantization_loss(), layer.weight)
        with torch.no_grad():
            layer.weight -= 0.1 / projections * gradient
        torch.testing.assert_close(layer.weight.abs().mean(), scale, **EXACT)
    torch.testing.assert_close(layer.weight.detach(), scale * before.sign(), rtol=1e-6, atol=1e-6)


# --- initial values -------------------------------------------------------------------------------------------------


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


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"groups": 2}, ["groups", "in_channels=3", "out_channels=8", "2"]),
        ({"out_channels": 6, "projections": 4}, ["projections", "out_channels=6", "4"]),
        ({"projections": 0}, ["projections", "0", "at least 1"]),
        ({"in_channels": 0}, ["in_channels", "0", "at least 1"]),
        ({"out_channels": 0}, ["out_channels", "0", "at least 1"]),
        ({"kernel_size": 0}, ["kernel_size", "0", "at least 1"]),
        ({"kernel_size": (3, 0)}, ["kernel_size", "0", "at least 1"]),
        ({"stage": "quaternary"}, ["stage", "'quaternary'", "binary", "ternary"]),
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
def test_wrong_arguments_raise(arguments, parts):
    correct = {"in_channels": 3, "out_channels": 8, "kernel_size": 3}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked part by part
        ProjectionConv2d(**{**correct, **arguments})
    assert all(part in str(error.value) for part in parts), str(error.value)
