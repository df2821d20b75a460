"""Progressive training: ternary kernels first, then binary ones."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pcnn_lightning.checks import check_integer, check_positive
from pcnn_lightning.errors import InputError


class StageSwitch(Callback):
    """Switch a ternary network to binary between two epochs of a run (Algorithm 3).

    The module owns the stage, and saves and restores it; this callback only decides when it ends. At the switch, the
    latent weights are kept, the optimizer's state is cleared, learning rate schedules restart, and the best metric is
    reset, so that the best checkpoint of the run is a binary one. The module may redraw second parameters
    (``reinit_projection`` of PCNN). Modules without a ternary stage, such as MCN, are left unchanged.

    A run that ``max_epochs`` or ``max_steps`` ends before the switch, such as a short trial, warns and stays ternary.

    Args:
        epoch: the first binary epoch or, below 1, its position as a fraction of ``max_epochs``: rounded, and at least
            1. Schedules of the ternary stage span the epochs before it.
        patience: switch earlier if ``monitor`` has not risen for this many validations; None never does.
        monitor: the metric to watch; higher is better.

    Raises:
        ValueError: if ``epoch`` or ``patience`` is not positive.
        InputError: when training starts, if the model is binary from the first epoch, or a share has no ``max_epochs``.
    """

    def __init__(self, epoch: float, patience: int | None = None, monitor: str = "val/accuracy") -> None:
        super().__init__()
        check_positive("epoch", epoch)
        if epoch > 1 and epoch != int(epoch):
            raise ValueError(f"epoch must be a share in (0, 1) or a positive whole number, but got {epoch}")
        if patience is not None:
            check_integer("patience", patience, 1)
        if not isinstance(monitor, str):
            raise ValueError(f"monitor must be the name of a metric, but got {monitor!r}")
        self.epoch, self.patience, self.monitor = epoch, patience, monitor
        self.best = float("-inf")
        self.validations_since_best = 0
        self._is_announced = False  # that the run ends before the switch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "ternary" not in pl_module.trained_stages:  # type: ignore[operator]
            rank_zero_info(f"StageSwitch has nothing to do: {type(pl_module).__name__} has no ternary stage")
            return
        if trainer.global_step == 0 and pl_module.stage != "ternary":
            raise InputError(f"StageSwitch needs a model with stage: ternary, but the model's is {pl_module.stage}")
        epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
        if epochs < 0 and self.epoch < 1:
            raise InputError(f"StageSwitch at a share of the run ({self.epoch}) needs trainer.max_epochs to be set")
        self.first_binary_epoch = max(1, round(self.epoch * epochs)) if self.epoch < 1 else int(self.epoch)
        if pl_module.stage == "ternary":
            pl_module.stage_end = self.first_binary_epoch  # type: ignore[assignment]
            self._is_announced = self.patience is None and self._announce(trainer, pl_module, epochs)

    def _announce(self, trainer: Trainer, pl_module: LightningModule, epochs: int) -> bool:
        """Warn if the run is to end before the switch."""
        steps = -(-trainer.num_training_batches // pl_module.hparams.get("accumulate", 1)) * self.first_binary_epoch
        if 0 <= epochs <= self.first_binary_epoch:
            end = f"trainer.max_epochs {epochs}"
        elif 0 <= trainer.max_steps <= steps:
            end = f"trainer.max_steps {trainer.max_steps}"
        else:
            return False
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{end} ends this run before StageSwitch at epoch {self.first_binary_epoch} (step {steps:.0f}): "
                "only the ternary stage is trained"
            )
        return True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:  # not on_train_epoch_start, which is skipped when resuming from the end of an epoch
            return
        stalled = self.patience is not None and self.validations_since_best >= self.patience
        if pl_module.stage == "ternary" and (trainer.current_epoch >= self.first_binary_epoch or stalled):
            pl_module.begin_stage("binary", trainer.current_epoch)  # type: ignore[operator]
            forget_best(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.patience is None or trainer.sanity_checking or pl_module.stage != "ternary":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise InputError(f"StageSwitch cannot watch {self.monitor}, which is not logged; there is {known}")
        value = float(trainer.callback_metrics[self.monitor])
        if value > self.best:
            self.best, self.validations_since_best = value, 0
        else:
            self.validations_since_best += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.stage == "ternary" and not self._is_announced and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(f"the run has ended before StageSwitch at epoch {self.first_binary_epoch}: it is ternary")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "validations_since_best": self.validations_since_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.validations_since_best = state_dict["best"], state_dict["validations_since_best"]


def forget_best(trainer: Trainer) -> None:
    """Reset the best metric of checkpoints and early stopping. Files that are already written stay."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            callback.best_model_score = None
            callback.best_model_path = ""
            callback.best_k_models = {}
            callback.kth_best_model_path = ""
            callback.kth_value = torch.tensor(float("inf" if callback.mode == "min" else "-inf"))
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(float("inf" if callback.mode == "min" else "-inf"))
