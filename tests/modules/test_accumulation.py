"""Gradient accumulation."""

from functools import partial

import pytest
import torch
from tiny import fit, frozen_norm, tiny_digits, tiny_pcnn
from torch import nn


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 8), (2, 4), (3, 4), (4, 2), (9, 2)])
def test_global_step_counts_updates(accumulate, updates):
    trainer = fit(tiny_pcnn(accumulate=accumulate), max_epochs=2)  # 4 batches an epoch
    assert trainer.global_step == updates


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_accumulation_equals_one_batch_of_the_whole_size(eta):
    """Without batch statistics: 56 images make two updates on 24 images and one on 8."""

    def run(batch_size, accumulate):
        torch.manual_seed(0)
        model = tiny_pcnn(accumulate=accumulate, eta=eta, center_loss_weight=0.01, projection_loss_weight=0.1).double()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.0
                layer.forward = partial(frozen_norm, layer)
        data = tiny_digits(batch_size=batch_size, train_size=56)
        data.on_after_batch_transfer = lambda batch, index, of=data.on_after_batch_transfer: [
            part.double() if part.is_floating_point() else part for part in of(batch, index)
        ]
        loader = data.train_dataloader
        data.train_dataloader = lambda: with_the_last_batch(loader())
        trainer = fit(model, data)
        assert trainer.global_step == 3
        return model

    whole, parts = run(24, 1), run(8, 3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-7, atol=1e-9, msg=name)


def with_the_last_batch(loader):
    return type(loader)(
        loader.dataset, loader.batch_size, sampler=loader.sampler, collate_fn=loader.collate_fn, drop_last=False
    )


def test_validation_within_an_update_loses_no_gradient():
    def run(**trainer):
        torch.manual_seed(0)
        model = tiny_pcnn(accumulate=4)
        fit(model, **trainer)
        return model.state_dict()

    between, after = run(val_check_interval=1), run(limit_val_batches=0)
    for name, value in after.items():
        assert torch.equal(between[name], value), name
