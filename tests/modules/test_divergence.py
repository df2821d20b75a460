"""NaN stops a run and is never saved."""

import math
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import fit, tiny_pcnn

from pcnn_lightning import PCNN, StageCheckpoint, StageSwitch
from pcnn_lightning.errors import DivergedError


class Poison(Callback):
    """Fill the classifier with NaN after so many batches."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.batches:
            with torch.no_grad():
                pl_module.net.classifier.weight.fill_(math.nan)


def test_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    with pytest.raises(DivergedError, match=r"step 6 .*eta1 \(now 0.05\).*last\.ckpt"):
        fit(tiny_pcnn(), max_epochs=3, callbacks=[Poison(6), checkpoint], enable_checkpointing=True)
    loaded = PCNN.load_from_checkpoint(tmp_path / "last.ckpt")
    assert all(value.isfinite().all() for value in loaded.state_dict().values())


def test_nan_weights_are_not_saved(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    with pytest.raises(DivergedError, match=r"classifier\.weight holds NaN"):
        fit(tiny_pcnn(), max_epochs=3, callbacks=[Poison(8), checkpoint], enable_checkpointing=True)
    for file in tmp_path.glob("*.ckpt"):
        loaded = PCNN.load_from_checkpoint(file)
        assert all(value.isfinite().all() for value in loaded.state_dict().values())


class Overflow(Callback):
    """Let a running variance overflow after the validation of an epoch, which no loss shows."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_validation_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.net.features.stem.norm.running_var.fill_(math.inf)


@pytest.mark.parametrize("kind", [StageCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize("save_last", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 2])  # the switch is at 2
def test_the_last_good_checkpoint_is_one_that_is_there(tmp_path, epoch, save_last, kind):
    keep = kind(str(tmp_path), monitor="val/accuracy", mode="max", save_last=save_last)
    callbacks = [StageSwitch(2), Overflow(epoch), keep]
    with pytest.raises(DivergedError, match=r"running_var holds NaN.*Last good checkpoint: ") as caught:
        fit(tiny_pcnn(stage="ternary"), max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    named = re.sub(r".*Last good checkpoint: ", "", str(caught.value))
    written = {str(file) for file in tmp_path.glob("*.ckpt")}
    assert named in (written or {"none yet"})
    if save_last and epoch > 0:
        assert Path(named).name == "last.ckpt"
