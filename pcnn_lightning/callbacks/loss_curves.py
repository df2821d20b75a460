"""Cross-entropy, projection (or filter) loss and center loss of a run, side by side."""

import csv
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

LOSSES = {  # Okabe and Ito's colours, which colour-blind readers can tell apart
    "cross_entropy": ("cross-entropy", "#0072B2"),
    "projection_loss": ("projection loss", "#D55E00"),
    "filter_loss": ("filter loss", "#D55E00"),
    "center_loss": ("center loss", "#009E73"),
}
TAGS = re.compile(rf"^(train|val)/({'|'.join(LOSSES)})$")


class LossCurves(Callback):
    """Record the losses of every epoch: one chart in TensorBoard, ``losses.csv`` and ``losses.png`` at the end.

    In TensorBoard the chart is under "Custom scalars". The files go to the folder of the run's logs, also when the
    run is broken off. A resumed run continues its curves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[dict[str, Any]] = []
        self._validation: dict[str, float] = {}  # of this epoch, if it had one
        self._folder: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Asked for here, by all processes, because it is broadcast: at an exception they are no longer in step.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars({"training": {"losses": ["Multiline", [TAGS.pattern]]}})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "stage": str(pl_module.stage), **self._validation}
        self.epochs.append({**row, **_losses(trainer, "train")})
        self._validation = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation = _losses(trainer, "val")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]

    def _write(self, trainer: Trainer) -> None:
        if not self.epochs or self._folder is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(name for epoch in self.epochs for name in epoch))
        with (self._folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.epochs)
        draw_losses(self.epochs).savefig(self._folder / "losses.png")


def _losses(trainer: Trainer, split: str) -> dict[str, float]:
    found = {name: TAGS.match(name) for name in trainer.callback_metrics}
    return {name: float(trainer.callback_metrics[name]) for name, tag in found.items() if tag and tag[1] == split}


def draw_losses(epochs: list[dict[str, Any]]) -> Figure:
    """Losses against epochs, training solid and validation dashed, with a line where the stage changes.

    The loss of the kernels is drawn once, since it is the same whatever the data.

    Args:
        epochs: rows with ``epoch``, ``stage`` and values named as in the logs, such as ``train/cross_entropy``.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for loss, (label, colour) in LOSSES.items():
        for split, dash, what in (("train", "-", "training"), ("val", "--", "validation")):
            points = [(row["epoch"], row[name]) for row in epochs if row.get(name := f"{split}/{loss}") is not None]
            of_kernels = loss in ("projection_loss", "filter_loss")  # the same on any data
            if points and not (of_kernels and split == "val"):
                name = label if of_kernels else f"{label}, {what}"
                axes.plot(*zip(*points, strict=True), dash, color=colour, linewidth=1.5, label=name)
    for before, after in pairwise(epochs):
        if before["stage"] != after["stage"]:
            axes.axvline(after["epoch"] - 0.5, color="0.4", linewidth=1, linestyle=":")
            for stage, side, offset in ((before["stage"], "right", -4), (after["stage"], "left", 4)):
                axes.annotate(
                    stage,
                    (after["epoch"] - 0.5, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(offset, -4),
                    textcoords="offset points",
                    ha=side,
                    va="top",
                    color="0.3",
                )
    axes.set(xlabel="epoch", ylabel="loss (nats; penalties as weighted)", yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
