"""Progress bar."""

import logging
import math
import sys
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.progress import ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from torch import Tensor

WIDE = 100
"""Columns of a terminal in which the learning rates have room as well."""


class StageProgressBar(RichProgressBar):
    """A line with the epoch, the stage, the loss and the last validation accuracy; in a wide terminal, learning rates.

    The line is below what is printed, and goes when training ends. It is shown in terminals and notebooks only, so that
    log files hold nothing but lines. The loss is read every ``trainer.log_every_n_steps`` batches; Lightning's own bar
    synchronizes with the device in every batch.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)
        self._loss: float | None = None
        self._accuracy: float | None = None

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and (sys.stdout.isatty() or get_console().is_jupyter)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Lightning's log holds on to the stream of its import, and would write into the bar.
        if self.is_enabled and sys.stderr.isatty():
            for handler in logging.getLogger("lightning.pytorch").handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
                    handler.setStream(_Stderr())

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        _, bar, *_ = super().configure_columns(trainer)
        return [
            _Words(lambda task: self._place(trainer, task)),
            bar,  # takes what the others leave
            _Words(_batches),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            _Words(lambda task: self._numbers(trainer, task)),
        ]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {}  # Lightning's column of metrics would fold them

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (batch_idx + 1) % every == 0 and self.is_enabled:
            self._loss = float(outputs["loss"])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._show_training(False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/accuracy")
        if isinstance(accuracy, Tensor) and not trainer.sanity_checking and self.is_enabled:
            self._accuracy = float(accuracy)
        super().on_validation_end(trainer, pl_module)
        self._show_training(True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.progress is not None:
            self.progress.live.transient = True
        super().teardown(trainer, pl_module, stage)

    def _show_training(self, visible: bool) -> None:
        """Show or hide the bar of an epoch, which gives its line to that of a validation."""
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, visible=visible)

    def _place(self, trainer: Trainer, task: Task) -> str:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return task.description
        epoch, end = trainer.current_epoch + 1, trainer.max_epochs or -1
        place = f"{min(epoch, end)}/{end}" if end > 0 else str(epoch)  # after the last epoch, one more has begun
        validates = task.description == self.validation_description
        return f"epoch {place} {'validation' if validates else trainer.lightning_module.stage_name}"

    def _numbers(self, trainer: Trainer, task: Task) -> str:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return ""
        known = {"loss": self._loss, "acc": self._accuracy}
        words = [f"{name} {value:.3f}" for name, value in known.items() if value is not None]
        if get_console().width >= WIDE:
            rates = zip(("η₁", "η₂"), trainer.lightning_module.learning_rates.values(), strict=False)  # type: ignore[operator]
            words += [f"{name} {rate:.2g}" for name, rate in rates]
        return " ".join(words)


def _batches(task: Task) -> str:
    total = f"/{task.total:.0f}" if math.isfinite(task.total or math.inf) else ""
    return f"{task.completed:.0f}{total}" + (f" {task.speed:.1f}it/s" if task.speed else "")


class _Stderr:
    """The present ``sys.stderr``, which the bar replaces by one that prints above it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


class _Words(ProgressColumn):
    """A column of text that does not fold."""

    def __init__(self, words: Callable[[Task], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._words = words

    def render(self, task: Task) -> Text:
        return Text(self._words(task))
