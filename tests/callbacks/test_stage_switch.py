"""The switch from the ternary to the binary stage."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tiny import PROGRESSIVE, Decline, fit, tiny_pcnn

from pcnn_lightning import PCNN, StageSwitch
from pcnn_lightning.errors import InputError


class Record(Callback):
    """Record the network at the start of each epoch, after a switch."""

    def __init__(self):
        self.stages, self.weights, self.momenta, self.first_rates = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.stages.append(pl_module.stage)
            self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})
            self.momenta.append(len(trainer.optimizers[0].state))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.first_rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class EndOfEpoch(Callback):
    """Record the weights at the end of each epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


@pytest.mark.parametrize("reinit", [False, True])
def test_switch_keeps_c_and_restarts_the_optimizer(reinit):
    record, ends = Record(), EndOfEpoch()
    model = tiny_pcnn(**PROGRESSIVE, reinit_projection=reinit)
    fit(model, max_epochs=4, callbacks=[StageSwitch(2), record, ends])
    assert record.stages == ["ternary", "ternary", "binary", "binary"]
    for name, before in ends.weights[1].items():
        redrawn = reinit and name.endswith(".projection")
        assert torch.equal(before, record.weights[2][name]) != redrawn, name
    assert record.momenta == [0, len(list(model.parameters())), 0, len(list(model.parameters()))]
    half = 0.5 * 0.05 * (1 + math.cos(math.pi / 2))
    assert record.first_rates == pytest.approx([0.05, half, 0.05, half])
    for layer in model.one_bit_layers.values():
        assert len(layer.quantized_weight().unique()) == 2


@pytest.mark.parametrize(("share", "max_epochs", "ternary"), [(0.4, 5, 2), (0.5, 2, 1), (0.1, 3, 1)])
def test_the_switch_may_be_a_share_of_the_run(share, max_epochs, ternary):
    record = Record()
    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=max_epochs, callbacks=[StageSwitch(share), record], limit_train_batches=1)
    assert record.stages == ["ternary"] * ternary + ["binary"] * (max_epochs - ternary)


def test_the_first_forward_after_the_switch_is_binary():
    values = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            layer = next(iter(pl_module.one_bit_layers.values()))
            layer.register_forward_hook(lambda layer, *_: values.append(len(layer.quantized_weight().unique())))

    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=2, callbacks=[StageSwitch(1), Look()], limit_val_batches=0)
    assert values == [3] * 4 + [2] * 4


def test_a_plateau_switches_early():
    record = Record()
    model = tiny_pcnn(stage="ternary", eta1=0.0, eta2=0.0)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 0.0  # nothing learns, so validation accuracy stands still
    fit(model, max_epochs=6, callbacks=[StageSwitch(5, patience=2), record])
    assert record.stages == ["ternary"] * 3 + ["binary"] * 3


def test_a_run_that_ends_before_the_switch_says_so():
    with pytest.warns(UserWarning, match="has ended before stage binary at epoch 3: it is ternary"):
        fit(tiny_pcnn(stage="ternary"), max_epochs=4, callbacks=[StageSwitch(3), Halt()])


class Halt(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_best_checkpoint_is_binary_even_if_a_ternary_epoch_was_better(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/declining", mode="max", filename="{epoch}")
    stopping = EarlyStopping("val/declining", mode="max", patience=2)
    callbacks = [Decline(), StageSwitch(2), checkpoint, stopping]
    trainer = fit(tiny_pcnn(**PROGRESSIVE), max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
    assert checkpoint.best_model_path.endswith("epoch=2.ckpt")
    assert float(checkpoint.best_model_score) == pytest.approx(0.8)
    assert PCNN.load_from_checkpoint(checkpoint.best_model_path).stage == "binary"
    assert trainer.current_epoch == 4, "early stopping forgot nothing"


def test_early_stopping_restarts_with_the_binary_stage():
    stopping = EarlyStopping("val/accuracy", mode="max", patience=2, min_delta=1.0)  # nothing is ever better
    trainer = fit(tiny_pcnn(stage="ternary"), max_epochs=8, callbacks=[StageSwitch(2), stopping])
    assert trainer.current_epoch == 5  # 2 ternary epochs, then a best one and 2 that are not better


@pytest.mark.parametrize(
    ("model", "switch", "message"),
    [
        ({"stage": "binary"}, StageSwitch(1), "stage: ternary, but the model's is binary"),
        ({"stage": "ternary"}, StageSwitch(2, patience=1, monitor="val/top"), "cannot watch val/top"),
    ],
)
def test_impossible_switches_are_refused(model, switch, message):
    with pytest.raises(InputError, match=message):
        fit(tiny_pcnn(**model), max_epochs=3, callbacks=[switch])


def test_a_full_precision_network_is_left_alone():
    model = tiny_pcnn(full_precision=True)
    fit(model, max_epochs=2, callbacks=[StageSwitch(1)])
    assert (model.stage, model.stage_start) == ("full_precision", 0)


def test_wrong_arguments_raise():
    for epoch in (0, -1, 1.5, math.nan, math.inf, None, True):
        with pytest.raises(ValueError, match=f"epoch must be a .*positive.* number, but got {epoch}"):
            StageSwitch(epoch)
    for patience in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"patience must be an integer of at least 1, but got {patience}"):
            StageSwitch(1, patience=patience)


@pytest.mark.parametrize(("epoch", "max_epochs", "first"), [(3, 3, 3), (60, 1, 60), (0.9, 3, 3), (0.4, 1, 1)])
def test_a_trial_that_ends_before_the_switch_trains_the_ternary_stage_and_warns_once(epoch, max_epochs, first):
    record = Record()
    with pytest.warns(UserWarning, match="before stage") as warned:
        fit(tiny_pcnn(**PROGRESSIVE), max_epochs=max_epochs, callbacks=[StageSwitch(epoch), record])
    assert record.stages == ["ternary"] * max_epochs
    (said,) = [str(one.message) for one in warned if "before stage" in str(one.message)]
    end, steps = f"trainer.max_epochs {max_epochs} ends this run", 4 * first
    assert said == f"{end} before stage binary begins at epoch {first} (step {steps}): only ternary is trained"


def test_a_trial_goes_on_into_the_binary_stage(tmp_path):
    """With constant rates, because others are laid over the length of the trial."""
    arguments = {**PROGRESSIVE, "schedule": "constant"}
    whole = tiny_pcnn(**arguments)
    parts = copy.deepcopy(whole)
    fit(whole, max_epochs=3, callbacks=[StageSwitch(2)])
    with pytest.warns(UserWarning, match="only ternary is trained"):
        fit(parts, max_epochs=1, callbacks=[StageSwitch(2)]).save_checkpoint(tmp_path / "trial.ckpt")
    again = tiny_pcnn(**arguments)
    fit(again, max_epochs=3, callbacks=[StageSwitch(2)], ckpt_path=str(tmp_path / "trial.ckpt"))
    assert again.stage == "binary"
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())


def test_steps_that_end_before_the_switch_are_counted_in_updates():
    """An epoch has four batches, so two updates of two."""
    model = tiny_pcnn(**PROGRESSIVE, accumulate=2)
    ends = r"trainer.max_steps 4 ends this run before stage binary begins at epoch 2 \(step 4\)"
    with pytest.warns(UserWarning, match=ends):
        fit(model, max_epochs=3, max_steps=4, callbacks=[StageSwitch(2)])
    assert model.stage == "ternary"
    model = tiny_pcnn(**PROGRESSIVE, accumulate=2)
    fit(model, max_epochs=3, max_steps=5, callbacks=[StageSwitch(2)])
    assert model.stage == "binary"
