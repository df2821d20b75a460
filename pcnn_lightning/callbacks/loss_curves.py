"""Curves of the loss terms over a run."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure

from pcnn_lightning.callbacks.drawing import BLUE, GREEN, GREY, ORANGE, PINK, DrawingCallback, mark_stages
from pcnn_lightning.losses import LossTerm

COLOURS = (BLUE, ORANGE, GREEN, PINK, GREY)


class LossCurves(DrawingCallback):
    """Record every term of the loss in each epoch: a chart in TensorBoard, ``losses.csv`` and ``losses.png``.

    In TensorBoard, the chart is under "Custom scalars". The files are written to the log folder at the end of the run,
    even if it is interrupted. A resumed run continues its curves.
    """

    recorded = ("epochs", "validation")

    def begin_anew(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self._terms: Mapping[str, LossTerm] = {}
        self.validation: dict[str, float] = {}  # of this epoch; empty without validation

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._terms = pl_module.terms  # type: ignore[assignment]
        tags = rf"^(train|val)/({'|'.join(self._terms)})$"
        for writer in self.writers:
            writer.add_custom_scalars({"training": {"losses": ["Multiline", [tags]]}})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "stage": str(pl_module.stage), **self.validation}
        self.epochs.append({**row, **self._logged(trainer, "train")})
        self.validation = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validation = self._logged(trainer, "val")

    def _logged(self, trainer: Trainer, split: str) -> dict[str, float]:
        metrics = trainer.callback_metrics
        tags = [f"{split}/{name}" for name in self._terms]
        return {tag: float(metrics[tag]) for tag in tags if tag in metrics}

    def draw(self, trainer: Trainer) -> None:
        if self.folder is not None and self.epochs:
            self.write("losses", self.epochs)
            self.show("losses", draw_losses(self.epochs, self._terms), self.epochs[-1]["epoch"])


def draw_losses(epochs: list[dict[str, Any]], terms: Mapping[str, LossTerm]) -> Figure:
    """Plot the loss terms against epochs, training solid and validation dashed, with a line where the stage changes.

    A term that does not depend on the data is drawn once.

    Args:
        epochs: rows with ``epoch``, ``stage`` and values by their logged names, such as ``train/cross_entropy``.
        terms: the loss terms by their logged names.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, term) in enumerate(terms.items()):
        splits = {"train": ("-", f"{term.label}, training"), "val": ("--", f"{term.label}, validation")}
        if not term.depends_on_data:
            splits = {"train": ("-", term.label)}
        for split, (dash, label) in splits.items():
            points = [(row["epoch"], row[tag]) for row in epochs if row.get(tag := f"{split}/{name}") is not None]
            if points:
                colour = COLOURS[index % len(COLOURS)]
                axes.plot(*zip(*points, strict=True), dash, color=colour, linewidth=1.5, label=label)
    mark_stages(axes, epochs)
    axes.set(xlabel="epoch", ylabel="loss (nats; penalties as weighted)", yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
