"""Activation checkpointing repeats a forward pass within the backward pass; a layer learns as without it."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pcnn_lightning.layers import BinaryConv2d, ModulatedConv2d, ProjectionConv2d

LAYERS = {
    "PCNN, binary": lambda: ProjectionConv2d(4, 8, 3, padding=1, projections=2, projection_loss_weight=0.1),
    "PCNN, ternary": lambda: ProjectionConv2d(4, 8, 3, projections=2, stage="ternary", projection_loss_weight=0.1),
    "PCNN, J = 1": lambda: ProjectionConv2d(4, 8, 3, projection_loss_weight=0.1),
    "MCN": lambda: ModulatedConv2d(4, 8, 3, filter_loss_weight=0.1),
    "MCN, four levels": lambda: ModulatedConv2d(4, 8, 3, levels=4, filter_loss_weight=0.1),
    "U-MCN": lambda: ModulatedConv2d(4, 8, 3, binarize=False, filter_loss_weight=0.1),
    "BNN": lambda: BinaryConv2d(4, 8, 3),
}
reentrance = pytest.mark.parametrize("use_reentrant", [True, False])


def total(layer, y):
    loss = layer.quantization_loss()
    return y.square().mean() if loss is None else y.square().mean() + loss


@reentrance
@pytest.mark.parametrize("name", LAYERS)
def test_a_checkpointed_layer_learns_the_same_weights(name, use_reentrant):
    def learn(run):
        torch.manual_seed(0)
        layer = LAYERS[name]()
        optimizer = torch.optim.SGD(layer.parameters(), 0.01)
        for _ in range(4):
            loss = total(layer, run(layer, torch.randn(2, 4, 6, 6, requires_grad=True)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return layer.state_dict()

    plain = learn(lambda layer, x: layer(x))
    checkpointed = learn(lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant))
    for parameter, value in plain.items():
        assert torch.equal(checkpointed[parameter], value), parameter


@reentrance
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "BNN"])
def test_the_repeated_pass_leaves_no_loss_behind(name, use_reentrant):
    layer = LAYERS[name]()
    y = checkpoint(layer, torch.randn(2, 4, 6, 6, requires_grad=True), use_reentrant=use_reentrant)
    total(layer, y).backward()
    with torch.no_grad():
        layer.weight *= 2
    assert layer.quantization_loss() == copy.deepcopy(layer).quantization_loss()
