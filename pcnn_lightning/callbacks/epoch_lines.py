"""A line an epoch, for terminals and log files."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from pcnn_lightning.tables import duration, terminal_width


class EpochLines(Callback):
    """Print a line at the end of each epoch: stage, losses, accuracy, learning rates, seconds, and the time left.

    CE is the cross-entropy. Where there are two numbers, the first is of training and the second of validation. The
    time left is that of the remaining epochs, at the mean pace of the epochs of this process. The learning rates are
    left out where the line would be wider than the terminal. The header is repeated when the columns change.
    """

    def __init__(self) -> None:
        self._header = ""
        self._began = self._seconds = 0.0
        self._epochs = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._header, self._seconds, self._epochs = "", 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = time.monotonic()
        seconds, self._began = now - self._began, now
        self._seconds, self._epochs = self._seconds + seconds, self._epochs + 1
        columns = {"epoch": _place(trainer), "stage": str(pl_module.stage_name), **_metrics(trainer, pl_module)}
        values = pl_module.learning_rates.values()  # type: ignore[operator]
        rates = "/".join(("η₁", "η₂")[: len(values)])
        columns[rates] = "/".join(f"{rate:.0e}".replace("e-0", "e-") for rate in values)
        columns["s"] = f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"
        if (trainer.max_epochs or -1) > 0:
            columns["left"] = duration(self._seconds / self._epochs * (trainer.max_epochs - trainer.current_epoch - 1))  # type: ignore[operator]
        header, line = _aligned(columns)
        if len(header) > terminal_width():
            del columns[rates]
            header, line = _aligned(columns)
        if header != self._header:
            self._header = header
            print(header)
        print(line, flush=True)


WIDTHS = {"epoch": 7, "stage": 7, "CE": 11, "accuracy": 11, "η₁": 4, "η₁/η₂": 9, "s": 4, "left": 7}
"""Of columns whose cells vary in width; together with the projection loss and the center loss, 80."""


def _aligned(columns: dict[str, str]) -> tuple[str, str]:
    widths = [max(len(name), len(cell), WIDTHS.get(name, 0)) for name, cell in columns.items()]
    header, line = (" ".join(map(str.rjust, cells, widths)) for cells in (columns, columns.values()))
    return header, line


def _place(trainer: Trainer) -> str:
    end = trainer.max_epochs or -1
    return f"{trainer.current_epoch + 1}/{end}" if end > 0 else str(trainer.current_epoch + 1)


def _metrics(trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
    """The terms of the loss and the accuracy, by their labels: of penalties, which need more digits, in training."""
    found = trainer.callback_metrics
    penalties = {name: term for name, term in pl_module.terms.items() if name != "cross_entropy"}  # type: ignore[union-attr, operator]
    names = {"cross_entropy": "CE", **{name: term.label.removesuffix(" loss") for name, term in penalties.items()}}
    cells = {}
    for name, label in {**names, "accuracy": "accuracy"}.items():
        splits, digits = (("train",), 4) if name in penalties else (("train", "val"), 3)
        numbers = [f"{float(found[f'{split}/{name}']):.{digits}f}" for split in splits if f"{split}/{name}" in found]
        if numbers:
            cells[label] = " ".join(numbers)
    return cells
