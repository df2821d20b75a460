"""Freezing whole networks."""

import copy

import pytest
import torch
from torch import nn
from trained_networks import IMAGE_SHAPE, MODELS, trained

from pcnn_lightning.deploy import freeze
from pcnn_lightning.layers import FrozenConv2d, ModulatedConv2d, ProjectionConv2d, QuantizedConv2d, SignActivation
from pcnn_lightning.reports.summary import summarize


@torch.no_grad()
def logits_and_signs(network, images):
    signs, hooks = [], []
    for module in network.modules():
        if isinstance(module, SignActivation):
            hooks.append(module.register_forward_hook(lambda _, __, output: signs.append(output)))
    logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, signs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_signs_and_logits_are_unchanged(name, dtype):
    network = trained(name).to(dtype)
    factors = torch.cat([module.weight for module in network.modules() if isinstance(module, nn.BatchNorm2d)])
    assert (factors < 0).float().mean() > 0.1
    images = torch.randn(4, *IMAGE_SHAPE, dtype=dtype)
    logits, signs = logits_and_signs(network, images)
    frozen_logits, frozen_signs = logits_and_signs(freeze(network), images)
    binarises = name.startswith("PCNN") and "full" not in name
    assert (sum(map(torch.Tensor.numel, signs)) > 1000) == binarises
    assert sum(int((one != other).sum()) for one, other in zip(signs, frozen_signs, strict=True)) == 0
    assert frozen_logits.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(frozen_logits, logits, rtol=0, atol=tolerance * float(logits.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_no_training_state_is_left(name):
    network = trained(name)
    frozen = freeze(network)
    gone = (QuantizedConv2d, nn.BatchNorm2d, nn.Dropout)
    assert not any(isinstance(module, gone) for module in frozen.modules())
    one_bit = [module for module in frozen.modules() if isinstance(module, FrozenConv2d)]
    assert len(one_bit) == sum(isinstance(module, QuantizedConv2d) for module in network.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(list(module.parameters()) for module in frozen.modules() if hasattr(module, "symbols"))
    # The frozen state has the sizes that the summary reports.
    total = summarize(network, IMAGE_SHAPE).total
    stored = frozen.state_dict().values()
    codes = sum(tensor.numel() for tensor in stored if tensor.dtype == torch.int8)
    floats = sum(tensor.numel() for tensor in stored if tensor.dtype == torch.float32)
    assert (codes, floats) == (total.parameters_1bit + total.parameters_2bit, total.parameters_32bit)
    assert all(tensor.dtype in (torch.int8, torch.float32) for tensor in stored)


@pytest.mark.parametrize("name", ["PCNN resnet18", "MCN mcn_small"])
def test_module_names_and_attributes_are_kept(name):
    network = trained(name)
    frozen = freeze(network)
    assert [name for name, _ in frozen.named_modules()] == [name for name, _ in network.named_modules()]
    for before, after in zip(network.modules(), frozen.modules(), strict=True):
        if isinstance(after, FrozenConv2d):
            for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
                assert getattr(after, attribute) == getattr(before, attribute)


@pytest.mark.parametrize("name", ["PCNN ternary", "MCN U=3", "MCN dropout"])
def test_freeze_does_not_modify_the_network(name):
    network = trained(name).train()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    frozen = freeze(network)
    for tensor in frozen.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_output_does_not_depend_on_the_mode():
    images = torch.randn(2, *IMAGE_SHAPE)
    for name in ("MCN dropout", "PCNN J=4"):
        frozen = freeze(trained(name))
        assert torch.equal(frozen(images), frozen.train()(images))


def test_freeze_during_training():
    """The pending loss of a forward pass, which holds a graph, is not copied."""
    network = trained("PCNN J=4").train()
    network(torch.randn(2, *IMAGE_SHAPE)).sum().backward()
    frozen = freeze(network)
    images = torch.randn(2, *IMAGE_SHAPE)
    torch.testing.assert_close(frozen(images), network.eval()(images))
    assert not frozen(images).requires_grad


@pytest.mark.parametrize("name", ["PCNN ternary", "MCN U=4"])
def test_freezing_twice_gives_an_equal_copy(name):
    once = freeze(trained(name))
    twice = freeze(once)
    assert str(once) == str(twice)
    states = once.state_dict(), twice.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert all(tensor.data_ptr() != states[1][key].data_ptr() for key, tensor in states[0].items())


def test_layers_nested_in_any_module_are_frozen():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([ProjectionConv2d(3, 4, 3), nn.ModuleDict({"inner": ModulatedConv2d(4, 4, 1)})])
            self.nothing = None
            self.register_module("no_module", None)

        def forward(self, x):
            return self.layers[1]["inner"](self.layers[0](x))

    network, x = Own(), torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(freeze(network)(x), network(x))
    assert isinstance(freeze(network.layers[0]), FrozenConv2d)
