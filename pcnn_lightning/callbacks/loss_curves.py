"""Curves of the loss terms and the accuracy over a run."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pcnn_lightning.callbacks.drawing import BLUE, ORANGE, DrawingCallback, mark_stages
from pcnn_lightning.checks import check_integer
from pcnn_lightning.devices import device_name
from pcnn_lightning.files import TESTED, TIMES, read_rows
from pcnn_lightning.losses import LossTerm

SPLITS = {"train": ("training", BLUE), "val": ("validation", ORANGE)}


class LossCurves(DrawingCallback):
    """Record the terms of the loss and the accuracy in each epoch: ``losses.csv`` and the figure ``losses``.

    The table has all metrics that are logged as ``train/...`` or ``val/...``, and grows with every epoch. The figure is
    drawn again every few epochs and at the end of the run, even if that is interrupted. A resumed run continues its
    curves. Tests of the run leave ``test.csv``, with the last metrics of each checkpoint and its stage. ``times.csv``
    has the seconds of each epoch, validation included, and the device; of an epoch that was interrupted, those since
    it went on.

    Args:
        every_n_epochs: epochs from one figure to the next.

    Raises:
        ValueError: if ``every_n_epochs`` is not positive.
    """

    recorded = ("epochs", "validation")

    def __init__(self, every_n_epochs: int = 10) -> None:
        super().__init__()
        check_integer("every_n_epochs", every_n_epochs, 1)
        self.every_n_epochs = every_n_epochs

    def begin_anew(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self._terms: Mapping[str, LossTerm] = {}
        self.validation: dict[str, float] = {}  # of this epoch; empty without validation

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._terms = pl_module.terms  # type: ignore[assignment]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_times(trainer)
        row = {"epoch": trainer.current_epoch, "stage": str(pl_module.stage_name), **self.validation}
        self.epochs.append({**row, **_logged(trainer, "train")})
        self.validation = {}
        if len(self.epochs) % self.every_n_epochs == 0:
            self.draw(trainer)
        else:
            self.write("losses", self.epochs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validation = _logged(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin_test(trainer)
        if self.folder is not None:
            stage = str(pl_module.stage_name)
            tested = {"checkpoint": str(trainer.ckpt_path), "stage": stage, **_logged(trainer, "test")}
            rows = read_rows(self.folder / TESTED)
            others = [row for row in rows if row.get("checkpoint") != tested["checkpoint"]]
            self.write("test", [*others, tested])

    def _write_times(self, trainer: Trainer) -> None:
        """Add the epoch to ``times.csv``, which no checkpoint holds: resumed runs are equal but for their times."""
        if self.folder is None:
            return
        now, device = time.monotonic(), device_name(trainer.strategy.root_device)
        devices = f"{trainer.world_size} x {device}" if trainer.world_size > 1 else device
        row = {"epoch": trainer.current_epoch, "seconds": f"{now - self._began:.2f}", "device": devices}
        self._began = now
        epochs = [str(epoch) for epoch in range(trainer.current_epoch)]
        before = [row for row in read_rows(self.folder / TIMES) if row.get("epoch") in epochs]
        self.write("times", [*before, row])

    def draw(self, trainer: Trainer) -> None:
        if self.folder is not None and self.epochs:
            self.write("losses", self.epochs)
            self.show("losses", draw_losses(self.epochs, self._terms), trainer.fit_loop.total_batch_idx)


def _logged(trainer: Trainer, split: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(f"{split}/")}


def draw_losses(epochs: list[dict[str, Any]], terms: Mapping[str, LossTerm]) -> Figure:
    """Plot each term of the loss and the accuracy against epochs, on scales of their own.

    Training and validation share a panel, and a line marks each change of stage. A term that does not depend on the
    data is drawn once.

    Args:
        epochs: rows with ``epoch``, ``stage`` and values by their logged names, such as ``train/cross_entropy``.
        terms: the loss terms by their logged names.
    """
    drawn = {name: term for name, term in terms.items() if any(f"train/{name}" in row for row in epochs)}
    figure = Figure(figsize=(8, 1.2 + 1.9 * (len(drawn) + 1)), dpi=120, layout="constrained")
    panels = figure.subplots(len(drawn) + 1, sharex=True, squeeze=False).flatten()
    for axes, (name, term) in zip(panels, drawn.items(), strict=False):
        _plot(axes, epochs, name, SPLITS if term.depends_on_data else ("train",))
        axes.set_ylabel(f"{term.label}\n({term.unit})")
        if axes.dataLim.y1 > 10 * axes.dataLim.minposy:
            axes.set_yscale("log")
    _plot(panels[-1], epochs, "accuracy", SPLITS, scale=100)
    panels[-1].set(ylabel="accuracy\n(%)", xlabel="epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels:
        mark_stages(axes, [row["epoch"] for row in epochs], [row["stage"] for row in epochs], labels=axes is panels[0])
        axes.grid(alpha=0.25)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=2, loc="outside upper center")
    return figure


def _plot(axes: Axes, epochs: list[dict[str, Any]], name: str, splits: Any, scale: float = 1) -> None:
    for split in splits:
        label, colour = SPLITS[split]
        points = [(row["epoch"], scale * row[tag]) for row in epochs if row.get(tag := f"{split}/{name}") is not None]
        if points:
            mark = "." if len(points) == 1 else ""  # a line needs two epochs
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, marker=mark, label=label)
