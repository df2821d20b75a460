"""Progress bar."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor


class StageProgressBar(RichProgressBar):
    """Progress bar with the stage, the loss, the last validation accuracy and the learning rates.

    The loss is read every ``trainer.log_every_n_steps`` batches; Lightning's own bar synchronizes with the device in
    every batch.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)
        self._loss: float | None = None
        self._accuracy: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (batch_idx + 1) % every == 0:
            self._loss = float(outputs["loss"])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/accuracy")
        if isinstance(accuracy, Tensor) and not trainer.sanity_checking:
            self._accuracy = float(accuracy)
        super().on_validation_end(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown: dict[str, Any] = {"stage": str(pl_module.stage)}
        for name, value in (("loss", self._loss), ("accuracy", self._accuracy)):
            if value is not None:
                shown[name] = f"{value:.4f}"
        if trainer.optimizers:
            rates = zip(("η₁", "η₂"), trainer.optimizers[0].param_groups, strict=False)
            shown |= {name: f"{group['lr']:.2g}" for name, group in rates}
        return shown
