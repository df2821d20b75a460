"""Learned thresholds in front of the sign."""

import copy

import pytest
import torch
from reference import sign
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pcnn_lightning.deploy import freeze
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import SignActivation


def test_thresholds_are_the_means_of_the_first_batch_in_training():
    torch.manual_seed(0)
    layer, x = SignActivation(threshold=3), torch.rand(4, 3, 5, 5)
    layer.eval()
    assert torch.equal(layer(x), torch.ones_like(x))  # not set, and nothing is negative
    assert not layer.is_set
    layer.train()
    signs = layer(x)
    means = torch.stack([x[:, channel].mean() for channel in range(3)])
    torch.testing.assert_close(layer.threshold.detach(), means)
    assert torch.equal(signs.detach(), sign(x - means[:, None, None]))
    layer(x + 7)
    torch.testing.assert_close(layer.threshold.detach(), means)


@pytest.mark.parametrize("gradient", ["clip", "polynomial"])
def test_gradients_are_those_of_the_shifted_sign(gradient):
    torch.manual_seed(0)
    layer, plain = SignActivation(gradient, threshold=3), SignActivation(gradient)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    weights = torch.randn(2, 3, 4, 4)
    (layer(x) * weights).sum().backward()
    shifted = (x.detach() - layer.threshold.detach()[:, None, None]).requires_grad_()
    (plain(shifted) * weights).sum().backward()
    torch.testing.assert_close(x.grad, shifted.grad)
    torch.testing.assert_close(layer.threshold.grad, -shifted.grad.sum(dim=(0, 2, 3)))


def test_a_checkpoint_has_the_thresholds_and_that_they_are_set():
    torch.manual_seed(0)
    layer, x = SignActivation(threshold=2), torch.randn(2, 2, 3, 3)
    layer(x)
    again = SignActivation(threshold=2)
    again.load_state_dict(layer.state_dict())
    again(x + 5)
    assert torch.equal(again.threshold, layer.threshold)
    fresh = SignActivation(threshold=2).state_dict()
    layer.load_state_dict(fresh)
    layer(x + 5)
    assert (layer.threshold > 3).all()


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["equal", "EMA"])
def test_averaged_thresholds_are_set(average):
    layer = SignActivation(threshold=2)
    averaged = AveragedModel(layer, multi_avg_fn=average, use_buffers=True)
    averaged.update_parameters(layer)
    layer(torch.randn(2, 2, 3, 3) + 5)
    averaged.update_parameters(layer)
    before = averaged.module.threshold.detach().clone()
    assert before.all()
    averaged.train()(torch.randn(2, 2, 3, 3))
    assert torch.equal(averaged.module.threshold, before)


def test_inputs_of_one_sign_are_refused_by_the_name_of_their_layer():
    x = torch.zeros(2, 3, 8, 8)
    x[0, 0, 0, 0] = -1
    with pytest.raises(InputError, match=r"^layer1\.conv2: 99\.\d% of its inputs have the same sign"):
        SignActivation(threshold=3, name="layer1.conv2")(x)


def test_a_frozen_activation_keeps_its_thresholds_and_nothing_else():
    torch.manual_seed(0)
    network, x = nn.Sequential(SignActivation(threshold=2)), torch.randn(2, 2, 3, 3)
    network(x)
    frozen = freeze(network)
    assert list(frozen.state_dict()) == ["0.norm.scale", "0.norm.shift"]
    assert torch.equal(frozen.train()(x + 1), network.eval()(x + 1))


def test_without_thresholds_nothing_is_stored():
    assert not SignActivation().state_dict()
    assert "threshold" not in repr(SignActivation())
    assert "threshold=4" in repr(SignActivation(threshold=4))
    assert copy.deepcopy(SignActivation(threshold=4)).threshold.shape == (4,)
    for wrong in (0, -1, True, 1.5, "4"):
        with pytest.raises(ValueError, match="threshold must be an integer of at least 1"):
            SignActivation(threshold=wrong)
