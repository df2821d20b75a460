"""Cross-entropy, projection (or filter) loss and center loss of a run, side by side."""

import re
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure

from pcnn_lightning.callbacks.drawing import BLUE, GREEN, ORANGE, DrawingCallback, mark_stages

LOSSES = {
    "cross_entropy": ("cross-entropy", BLUE),
    "projection_loss": ("projection loss", ORANGE),
    "filter_loss": ("filter loss", ORANGE),
    "center_loss": ("center loss", GREEN),
}
TAGS = re.compile(rf"^(train|val)/({'|'.join(LOSSES)})$")


class LossCurves(DrawingCallback):
    """Record the losses of every epoch: one chart in TensorBoard, ``losses.csv`` and ``losses.png`` at the end.

    In TensorBoard the chart is under "Custom scalars". The files go to the folder of the run's logs, also when the
    run is broken off. A resumed run continues its curves.
    """

    def begin_anew(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self._validation: dict[str, float] = {}  # of this epoch, if it had one

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for writer in self.writers:
            writer.add_custom_scalars({"training": {"losses": ["Multiline", [TAGS.pattern]]}})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "stage": str(pl_module.stage), **self._validation}
        self.epochs.append({**row, **_losses(trainer, "train")})
        self._validation = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation = _losses(trainer, "val")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write()

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]

    def _write(self) -> None:
        if self.folder is not None and self.epochs:
            self.write("losses", self.epochs)
            self.show("losses", draw_losses(self.epochs), self.epochs[-1]["epoch"])


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
    mark_stages(axes, epochs)
    axes.set(xlabel="epoch", ylabel="loss (nats; penalties as weighted)", yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
