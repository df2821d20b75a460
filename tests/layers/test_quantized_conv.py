"""What ``ProjectionConv2d`` and ``ModulatedConv2d`` share: their input, initial kernels and pending loss."""

import copy
import math

import modulated_layers
import projection_layers
import pytest
import torch

from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d


@pytest.fixture(params=["projection", "modulated"])
def family(request):
    return request.param


@pytest.fixture
def layer(family):
    return {"projection": projection_layers, "modulated": modulated_layers}[family].make_layer()


@pytest.fixture
def x(family):
    return projection_layers.draw_batch()[0] if family == "projection" else modulated_layers.draw_batch()


def loss_of(layer):
    return layer.quantization_loss()


def double_the_kernels(layer):
    """Double C, and with it the quantized kernels; the loss becomes four times what it was."""
    with torch.no_grad():
        layer.weight *= 2


def test_forward_does_not_binarize_its_input(layer, x):
    assert not torch.allclose(layer(x), layer(x.sign()))


@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (2, 2, 7, 6), (7, 6), (1, 2, 3, 7, 6)], ids=str)
def test_forward_refuses_other_input_channels(layer, shape):
    with pytest.raises(ValueError, match=r"in_channels=3") as error:
        layer(torch.zeros(shape, dtype=torch.float64))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(("kind", "planes"), [(ProjectionConv2d, {"projections": 4}), (ModulatedConv2d, {"planes": 4})])
def test_kernels_have_unit_gain_for_their_fan_in(kind, planes):
    torch.manual_seed(0)
    weight = kind(16, 256, 3, **planes).weight.detach()
    assert weight.mean().item() == pytest.approx(0, abs=0.01)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.05)


# --- the loss of a forward pass ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("helpers", "arguments"), [(projection_layers, {"eta": projection_layers.ETA}), (modulated_layers, {})]
)
def test_loss_has_the_same_value_wherever_it_is_taken(helpers, arguments):
    layer, batch = helpers.make_layer(**arguments), helpers.draw_batch()
    x = batch[0] if helpers is projection_layers else batch
    before = loss_of(layer)
    layer(x)
    of_forward, again = loss_of(layer), loss_of(layer)
    with torch.no_grad():
        layer(x)
        without_gradient = loss_of(layer)
    layer.eval()
    layer(x)
    assert before == of_forward == again == without_gradient == loss_of(layer)
    assert not without_gradient.requires_grad


def test_loss_of_a_forward_is_returned_once(layer, x):
    layer(x)
    double_the_kernels(layer)
    of_forward = loss_of(layer).item()
    assert loss_of(layer).item() == pytest.approx(4 * of_forward)


@pytest.mark.parametrize("training", [False, True])
def test_forward_in_eval_mode_or_without_gradient_keeps_no_loss(layer, x, training):
    layer.train(training)
    before = loss_of(layer).item()
    with torch.set_grad_enabled(not training):
        layer(x)
    double_the_kernels(layer)
    assert loss_of(layer).item() == pytest.approx(4 * before)


@pytest.mark.parametrize("mode", [True, False])
def test_changing_the_mode_discards_the_loss_of_the_last_forward(mode):
    layer = modulated_layers.make_layer()
    before = layer.quantization_loss().item()
    layer(modulated_layers.draw_batch())
    layer.train(mode)
    double_the_kernels(layer)
    assert layer.quantization_loss().item() == pytest.approx(4 * before)


def test_loss_under_no_grad_does_not_require_grad(layer, x):
    layer(x)
    with torch.no_grad():
        assert not loss_of(layer).requires_grad


def test_shallow_copy_does_not_share_the_loss_of_the_last_forward():
    layer = modulated_layers.make_layer()
    layer(modulated_layers.draw_batch())
    twin = copy.copy(layer)
    double_the_kernels(layer)  # of both: a shallow copy shares its parameters
    of_forward = layer.quantization_loss().item()
    assert twin.quantization_loss().item() == pytest.approx(4 * of_forward)
