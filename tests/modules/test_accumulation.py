"""Gradient accumulation."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from tiny import fit, frozen_norm, tiny_digits, tiny_pcnn, tiny_trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pcnn_lightning.errors import InputError


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


# --- data of unknown length -----------------------------------------------------------------------------------------


def seven_batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(7, 8, 1, 8, 8, dtype=torch.float64, generator=generator)
    return list(zip(images, torch.randint(10, (7, 8), generator=generator), strict=True))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(seven_batches())


@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize(("accumulate", "updates"), [(2, 4), (4, 2), (7, 1), (9, 1)])
def test_data_of_unknown_length_make_the_updates_of_known_data(accumulate, updates, eta):
    def run(batches):
        torch.manual_seed(0)
        model = tiny_pcnn(accumulate=accumulate, eta=eta, projection_loss_weight=0.1)
        trainer = tiny_trainer(max_epochs=2, precision="64-true")
        trainer.fit(model, DataLoader(batches, batch_size=None))
        assert trainer.global_step == 2 * updates
        return model.state_dict()

    unknown, known = run(Stream()), run(seven_batches())
    for name, value in known.items():
        torch.testing.assert_close(unknown[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_a_limit_that_hides_the_end_of_an_epoch_is_refused():
    with pytest.raises(InputError, match="accumulate must be 1 for data of unknown length with limit_train_batches=9"):
        tiny_trainer(limit_train_batches=9).fit(tiny_pcnn(accumulate=4), DataLoader(Stream(), batch_size=None))


def test_warm_up_over_data_of_unknown_length_has_one_rate_an_epoch():
    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = []
    trainer = tiny_trainer(max_epochs=3, callbacks=[Rates()])
    trainer.fit(tiny_pcnn(eta1=0.1, warmup_epochs=2).double(), DataLoader(Stream(), batch_size=None))
    assert rates == [0.05] * 7 + [0.1] * 14


def test_center_loss_cannot_be_accumulated_over_data_of_unknown_length():
    """It is a sum over an update, whose size would have to be known before its end."""

    def run(batches, **arguments):
        trainer = tiny_trainer(precision="64-true")
        trainer.fit(tiny_pcnn(center_loss_weight=0.1, **arguments), DataLoader(batches, batch_size=None))
        return trainer.global_step

    with pytest.raises(InputError, match="accumulate must be 1 for center_loss and data of unknown length, but got 4"):
        run(Stream(), accumulate=4)
    assert run(Stream(), accumulate=1) == 7
    assert run(seven_batches(), accumulate=4) == 2
