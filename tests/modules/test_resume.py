"""Interrupted and resumed runs end bit-equal to uninterrupted ones."""

import random
import signal

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny import PROGRESSIVE, Save, Stop, fit, tiny_digits, tiny_mcn, tiny_pcnn

from pcnn_lightning import LossCurves, StageCheckpoint, StageSwitch
from pcnn_lightning.errors import InputError


@pytest.mark.parametrize("reinit", [False, True])
@pytest.mark.parametrize("batches", [2, 4, 5, 8, 10, 12, 13])  # 4 per epoch, the switch is at 8
def test_a_resumed_run_ends_bit_equal(tmp_path, batches, reinit):
    def callbacks(folder):
        every = ModelCheckpoint(tmp_path / folder, "step", every_n_train_steps=1, enable_version_counter=False)
        return [StageSwitch(2), LossCurves(), StageCheckpoint(str(tmp_path / folder)), every]

    def run(folder, *more, **arguments):
        torch.manual_seed(arguments.pop("seed", 0))
        model, used = tiny_pcnn(**PROGRESSIVE, reinit_projection=reinit), callbacks(folder)
        data = tiny_digits(crop_padding=1)
        fit(model, data, max_epochs=4, callbacks=[*used, *more], enable_checkpointing=True, **arguments)
        return model, used

    whole, first = run("whole")
    with pytest.raises(RuntimeError, match="killed"):
        run("parts", Stop(batches))
    file = "last.ckpt" if batches % 4 == 0 else "step.ckpt"
    resumed, second = run("parts", seed=1, ckpt_path=str(tmp_path / "parts" / file))
    assert resumed.stage == "binary"
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [row["stage"] for row in second[1].epochs] == ["ternary", "ternary", "binary", "binary"]
    assert second[1].epochs == first[1].epochs
    assert second[2].stages == first[2].stages


class Terminate(Callback):
    """Send SIGTERM, as a cluster does, when a hook is called for the n-th time; n counts from 0."""

    def __init__(self, n, hook="on_train_batch_start"):
        self.n, self.seen = n, 0
        setattr(self, hook, self.count)

    def count(self, *arguments):
        if self.seen == self.n:
            signal.raise_signal(signal.SIGTERM)
        self.seen += 1


@pytest.mark.parametrize(("accumulate", "every"), [(1, 4), (3, 4), (3, 2), (1, 3)])  # batches per update and validation
@pytest.mark.parametrize("batch", [0, 3, 5, 7, 8, 10, 13, 15])  # 4 per epoch, the switch is at 8
def test_a_terminated_run_resumes_bit_equal(tmp_path, batch, accumulate, every):
    def run(folder, *more, **arguments):
        torch.manual_seed(arguments.pop("seed", 0))
        eta = 0.3 if accumulate > 1 else 0.0
        model = tiny_pcnn(**PROGRESSIVE, accumulate=accumulate, eta=eta)
        used = [StageSwitch(2), LossCurves(), StageCheckpoint(str(tmp_path / folder))]
        data = tiny_digits(crop_padding=1)
        arguments |= {"max_epochs": 4, "enable_checkpointing": True, "val_check_interval": every}
        fit(model, data, callbacks=[*used, *more], **arguments)
        return model, used

    whole, first = run("whole")
    with pytest.raises(SIGTERMException):
        run("parts", Terminate(batch))
    resumed, second = run("parts", seed=1, ckpt_path=str(tmp_path / "parts" / "last.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert second[1].epochs == first[1].epochs
    assert second[2].stages == first[2].stages


class End(Callback):
    """Ask for the end of a run, as ``max_time`` and EarlyStopping do, in its n-th batch."""

    def __init__(self, n):
        self.n, self.seen = n, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += 1
        trainer.should_stop = self.seen == self.n


@pytest.mark.parametrize(
    ("before", "after"),
    [({"max_steps": 6}, {"max_steps": 12}), ({"stop": 6}, {}), ({"stop": 9}, {}), ({"overfit_batches": 3}, {})],
    ids=["max_steps", "should_stop", "should_stop in the next epoch", "overfit_batches"],
)
@pytest.mark.parametrize("every", [3, 4])  # batches per validation; 4 per epoch
def test_a_run_that_ended_within_an_epoch_goes_on_there(tmp_path, before, after, every):
    def run(folder, stop=None, terminate=None, **arguments):
        torch.manual_seed(0)
        model, used = tiny_pcnn(), [LossCurves(), StageCheckpoint(str(tmp_path / folder))]
        more = [End(stop)] if stop else [Terminate(terminate)] if terminate else []
        every_batches = {"val_check_interval": min(every, arguments.get("overfit_batches", 4))}
        arguments = {"max_epochs": 3, "enable_checkpointing": True, **every_batches, **arguments}
        fit(model, callbacks=[*used, *more], **arguments)
        return model.state_dict(), used[0].epochs

    if "overfit_batches" in before:
        after = before
        with pytest.raises(SIGTERMException):
            run("parts", terminate=4, **before)
    else:
        run("parts", **before)
    weights, curves = run("parts", ckpt_path=str(tmp_path / "parts" / "last.ckpt"), **after)
    expected_weights, expected_curves = run("whole", **after)
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())
    assert curves == expected_curves


def test_a_run_is_not_continued_without_what_it_was_trained_with(tmp_path):
    def run(*callbacks, accumulate=1, **arguments):
        model = tiny_pcnn(stage="ternary", accumulate=accumulate)
        used = [StageCheckpoint(str(tmp_path)), *callbacks]
        fit(model, callbacks=used, max_epochs=4, enable_checkpointing=True, **arguments)

    last, average = str(tmp_path / "last.ckpt"), EMAWeightAveraging
    with pytest.raises(SIGTERMException):
        run(StageSwitch(2), average(), Terminate(1))
    with pytest.raises(
        InputError, match="goes through the stages ternary, binary: give it its stage_switch or stage_plan again"
    ):
        run(average(), ckpt_path=last)
    with pytest.raises(InputError, match=r"with averaged weights: give trainer\.callbacks its WeightAveraging again"):
        run(StageSwitch(2), ckpt_path=last)
    with pytest.raises(InputError, match="within an epoch: accumulate must be 1, but got 2"):
        run(StageSwitch(2), average(), ckpt_path=last, accumulate=2)
    run(StageSwitch(3), average(), ckpt_path=last)


HOOKS = ["on_validation_start", "on_validation_batch_start", "on_validation_end", "on_train_epoch_end"]


@pytest.mark.parametrize("every", [3, 4])  # batches per validation; 4 per epoch
@pytest.mark.parametrize("hook", HOOKS)
def test_a_run_terminated_outside_of_its_batches_keeps_its_curves(tmp_path, hook, every):
    def run(folder, *more, **arguments):
        torch.manual_seed(0)
        used = [StageSwitch(2), LossCurves(), StageCheckpoint(str(tmp_path / folder))]
        arguments |= {"max_epochs": 3, "enable_checkpointing": True, "val_check_interval": every}
        fit(tiny_pcnn(**PROGRESSIVE), callbacks=[*used, *more], **arguments)
        return used[1].epochs, used[2].stages

    with pytest.raises(SIGTERMException):
        run("parts", Terminate(1, hook))
    assert run("parts", ckpt_path=str(tmp_path / "parts" / "last.ckpt")) == run("whole")


@pytest.mark.parametrize("steps", [4, 6], ids=["at an epoch's end", "within an epoch"])
def test_a_resumed_mcn_run_ends_bit_equal(tmp_path, steps):
    torch.manual_seed(0)
    whole = tiny_mcn(levels=4, center_loss_weight=0.01)
    torch.manual_seed(0)
    first = tiny_mcn(levels=4, center_loss_weight=0.01)
    fit(whole, max_epochs=3)
    keep = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=steps, save_top_k=-1)
    fit(first, max_epochs=3, max_steps=steps, callbacks=[keep], enable_checkpointing=True)
    torch.manual_seed(1)
    resumed = tiny_mcn(levels=4, center_loss_weight=0.01)
    fit(resumed, max_epochs=3, ckpt_path=str(tmp_path / "x.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Jitter(Callback):
    """Scale each batch by random numbers of python, numpy and torch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0].mul_(random.uniform(0.5, 1) * np.random.uniform(0.5, 1) * torch.rand(()))


@pytest.mark.parametrize(
    ("batches", "file"), [(2, "batch"), (4, "batch"), (4, "validation"), (4, "epoch"), (7, "batch"), (8, "epoch")]
)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_a_run_that_draws_random_numbers_resumes_bit_equal(batches, file, accumulate, limit):
    """4 batches an epoch; with dropout, and with code that draws from every global generator."""

    def run(*more, seed=0, **arguments):
        for start in (torch.manual_seed, np.random.seed, random.seed):
            start(seed)
        model = tiny_mcn(dropout=0.3, accumulate=accumulate)
        steps = 12 if accumulate == 1 else 6
        length = {"max_epochs": 3} if limit == "max_epochs" else {"max_epochs": -1, "max_steps": steps}
        fit(model, callbacks=[Jitter(), *more], **length, **arguments)
        return model.state_dict()

    class StopAfter(Save):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.fit_loop.epoch_loop.batch_progress.total.completed == batches:
                raise RuntimeError("killed")

    whole = run()
    with pytest.raises(RuntimeError, match="killed"):
        run(StopAfter())
    resumed = run(seed=1, ckpt_path=f"{file}.ckpt")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
