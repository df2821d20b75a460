"""The estimate of what a training step keeps, against the tensors that autograd saves."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pcnn_lightning import BNN, MCN, PCNN
from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.reports import summarize


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_activations_are_estimated(backbone):
    family = MCN if backbone.startswith("mcn") else PCNN if backbone.startswith("wrn") else BNN
    model, batch = family(backbone=backbone), 4
    images: torch.Tensor = torch.randn(batch, 3, 32, 32)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 4 and len(tensor) == batch:  # of activations, not of kernels
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.net.train()(images).sum()
    saved = sum(storage.nbytes() for storage in kept.values()) / 4 / batch
    assert loss.requires_grad
    assert 0.8 <= saved / summarize(model.net, (3, 32, 32)).activations <= 2.4
