"""What callbacks that draw have in common."""

import csv
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, QuantizedConv2d

OneBitConv2d = ProjectionConv2d | ModulatedConv2d

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""


class DrawingCallback(Callback):
    """Shows figures in TensorBoard and writes them as PNG files into the folder of the run's logs.

    Only the first process draws and writes; ``folder`` and ``writers`` are empty on the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None
        self.writers: list[SummaryWriter] = []
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what an earlier run has recorded. Overridden by callbacks that record over epochs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.folder, self.writers = None, []
            if trainer.global_step == 0:  # else this trainer goes on; what a checkpoint knows is restored after this
                self.begin_anew()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Asked for here, by all processes, because it is broadcast: at an exception they are no longer in step.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.folder = folder
            self.writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]

    def show(self, name: str, figure: Figure, epoch: int, file: str | None = None) -> None:
        """Write ``figure`` to ``file``.png, or ``name``.png, and to TensorBoard under "Images"."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"{file or name}.png")
        for writer in self.writers:
            writer.add_figure(name, figure, epoch)

    def write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write ``rows`` to ``name``.csv; what a row lacks stays empty."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
            writer.writeheader()
            writer.writerows(rows)


def short_name(name: str) -> str:
    """The name of a layer without a leading ``net.features.`` or ``net.``."""
    return re.sub(r"^net\.(features\.)?", "", name)


def one_bit_layers(module: nn.Module) -> dict[str, QuantizedConv2d]:
    """The 1-bit layers, from input to output, by their short names."""
    return {short_name(name): layer for name, layer in module.named_modules() if isinstance(layer, QuantizedConv2d)}


def choose_layer(module: nn.Module, name: str | None) -> tuple[str, OneBitConv2d] | None:
    """A 1-bit layer and its name, without ``net.features.`` or ``net.``; None if ``module`` has no such layers.

    Args:
        module: where to look.
        name: of the layer, with or without that beginning; None takes the first.

    Raises:
        InputError: if there are 1-bit layers, but none of that name.
    """
    layers = {key: layer for key, layer in one_bit_layers(module).items() if isinstance(layer, OneBitConv2d)}
    if not layers:
        return None
    chosen = next(iter(layers)) if name is None else short_name(name)
    if chosen not in layers:
        raise InputError(f"there is no 1-bit layer {name}; there are {', '.join(layers)}")
    return chosen, layers[chosen]


def mark_stages(axes: Axes, epochs: list[dict[str, Any]]) -> None:
    """Draw a line where the stage changes, with the names of both stages beside it."""
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
