"""Base class and helpers of callbacks that draw figures."""

import csv
import io
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from pcnn_lightning.checkpoints import folder_of_run
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole
from pcnn_lightning.layers import QuantizedConv2d, one_bit_layers
from pcnn_lightning.loggers import StageLogger

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
"""Colors of Okabe and Ito, which color-blind readers can tell apart."""


class DrawingCallback(Callback):
    """Writes figures as PNG files to the folder of the run and shows them in TensorBoard, W&B and MLflow.

    Only the first process draws and writes; on the others, ``folder`` is None and ``loggers`` is empty.

    Attributes:
        recorded: names of the attributes that checkpoints hold, so that a resumed run continues its records.
    """

    recorded: tuple[str, ...] = ()
    layer: str | None = None  # of callbacks that look at some layers only

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None
        self.loggers: list[Logger] = []
        self._is_drawn = False
        self.begin_anew()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(layer=self.layer)  # a run may have one callback for each of several layers

    def begin_anew(self) -> None:
        """Discard the records of an earlier run. Overridden by callbacks that record over epochs."""

    def draw(self, trainer: Trainer) -> None:
        """Write figures and tables: at the end of training, when it is interrupted, or if nothing is left to train."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.folder, self.loggers = None, []
            if trainer.global_step == 0:  # otherwise this trainer continues; a checkpoint is restored after setup
                self.begin_anew()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_drawn = False
        folder = folder_of_run(trainer)  # asked for here, because after an exception the processes are out of step
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.folder = folder
            self.loggers = list(trainer.loggers)

    def begin_test(self, trainer: Trainer) -> None:
        """Write and show what follows in the folder of the run that is tested, if it has one.

        Called by all processes, like :meth:`on_fit_start`.
        """
        folder = folder_of_run(trainer)
        has_folder = trainer.loggers or getattr(trainer, "run_folder", None) is not None
        self.folder = folder if has_folder and trainer.is_global_zero else None
        self.loggers = list(trainer.loggers) if trainer.is_global_zero else []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draw(trainer)
        self._is_drawn = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_drawn:  # the checkpoint is of a run that was killed at its end
            self.draw(trainer)
            for logger in self.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.finalize("success")  # as Lightning has done before; drawing has opened it again

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.recorded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self.recorded:
            setattr(self, name, state_dict[name])

    @property
    def writers(self) -> list[SummaryWriter]:
        """TensorBoard's writers for what is measured in training."""
        boards = (logger for logger in self.loggers if isinstance(logger, TensorBoardLogger))
        return [board.training if isinstance(board, StageLogger) else board.experiment for board in boards]

    def log_scalars(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Log ``values`` in the first process; ``LightningModule.log`` must be called by every process."""
        for logger in self.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.total_batch_idx)

    def show(self, name: str, figure: Figure, step: int, file: str | None = None) -> None:
        """Write ``figure`` to ``<file>.png`` (default: ``<name>.png``) and to the loggers that take pictures."""
        if self.folder is None:
            return
        path = self.folder / f"{file or name}.png"
        image = io.BytesIO()
        figure.savefig(image, format="png")
        write_whole(path, image.getbuffer())
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure, step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(path))
            elif hasattr(logger, "log_image"):
                logger.log_image(name, [Image.open(image)], step)

    def write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write ``rows`` to ``<name>.csv``; missing values are left empty."""
        if self.folder is None:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
        # Names of classes and files may have bytes that are not UTF-8.
        write_whole(self.folder / f"{name}.csv", text.getvalue().encode(errors="backslashreplace"))


def choose_layers(module: nn.Module, name: str | None) -> dict[str, QuantizedConv2d]:
    """Choose 1-bit layers by name, from input to output; none if ``module`` has no 1-bit layers.

    Args:
        module: the LightningModule.
        name: path of a layer in ``model.net``, such as ``features.stage1.0.conv``, or a pattern of paths, such as
            ``features.stage*.0.conv``; None takes the first layer.

    Raises:
        InputError: if there are 1-bit layers, but none of that name.
    """
    layers = layers_of(module)
    if name is None:
        return dict(list(layers.items())[:1])
    chosen = {path: layer for path, layer in layers.items() if fnmatchcase(path, name)}
    if layers and not chosen:
        raise InputError(f"there is no 1-bit layer {name}; there are {', '.join(layers)}")
    return chosen


def layers_of(module: nn.Module) -> Mapping[str, QuantizedConv2d]:
    """The 1-bit layers by name, from input to output; also if ``module`` is not a ``StagedModule``."""
    layers: Mapping[str, QuantizedConv2d] | None = getattr(module, "one_bit_layers", None)
    return one_bit_layers(module) if layers is None else layers


def stage_of(module: nn.Module) -> str:
    """The name of the stage of a module; empty if it has none."""
    return str(getattr(module, "stage_name", ""))


def mark_stages(axes: Axes, places: Sequence[float], stages: Sequence[str], labels: bool = True) -> None:
    """Mark each change of stage by a vertical line halfway between two places, and name the stages.

    The names of two stages stand on both sides of the line; those of more, upright, where each of them begins.
    """
    changes = [
        ((start + end) / 2, before, after)
        for (start, before), (end, after) in pairwise(zip(places, stages, strict=True))
        if before != after
    ]
    for place, _, _ in changes:
        axes.axvline(place, color="0.4", linewidth=1, linestyle=":")
    if not labels or not changes:
        return
    begin: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "color": "0.3"}
    if len(changes) == 1:
        ((place, before, after),) = changes
        axes.annotate(before, (place, 1), xytext=(-4, -4), ha="right", **begin)
        axes.annotate(after, (place, 1), xytext=(4, -4), ha="left", **begin)
        return
    for place, name in [(places[0], stages[0]), *((place, after) for place, _, after in changes)]:
        axes.annotate(name, (place, 1), xytext=(2, -4), ha="left", rotation=90, fontsize="small", **begin)
