"""Filters of a 1-bit layer, such as projections or M-Filters, over the course of training."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from pcnn_lightning.callbacks.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    DrawingCallback,
    choose_layers,
    mark_stages,
    stage_of,
)
from pcnn_lightning.checks import check_integer
from pcnn_lightning.layers import QuantizedConv2d

MOST_POINTS, MOST_PANELS = 500, 8
COLOURS, DASHES = (BLUE, ORANGE, GREEN, PINK, GREY), ("-", "--", "-.")  # by row and by column


class FilterCurves(DrawingCallback):
    """Record each element of the filters of a layer against training steps (figure 3.11).

    The layer defines its filters (``QuantizedConv2d.filters``): PCNN has W; MCN has |M| or, in MCN-1, the mean of |M|,
    so that a plane has one element; the default is the first input channel of up to eight kernels. At the end of each
    epoch, the mean and standard deviation of each plane are logged to TensorBoard as ``filters/<layer>/plane0/mean``
    and ``.../std``. At the end of training, or if it is interrupted, ``filters.csv`` (step, plane, row, column, value)
    and ``filters.png``, which marks the change of stage, are written to the log folder; if ``layer`` is given, there is
    a ``filters_<layer>`` of each layer that it names. A resumed run continues its curves.

    Step 0, the last step and steps at a regular interval are recorded; the interval doubles whenever there would be
    more than 500 records. Only the first process records, and it synchronizes with the device once per epoch. A network
    without 1-bit layers produces no output.

    Args:
        layer: path of a layer in ``model.net``, such as ``features.stage1.0.conv``, or a pattern of several, such as
            ``features.stage*.0.conv``; None takes the first 1-bit layer.
        every_n_steps: optimizer steps between two records; None takes the trainer's ``log_every_n_steps``.

    Raises:
        ValueError: if ``every_n_steps`` is not positive.
        InputError: when training starts, if there is no 1-bit layer of that name.
    """

    recorded = ("steps", "stages", "values")

    def __init__(self, layer: str | None = None, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None:
            check_integer("every_n_steps", every_n_steps, 1)
        self.layer, self.every_n_steps = layer, every_n_steps
        self._chosen: Mapping[str, QuantizedConv2d] = {}
        self._every = 1

    def begin_anew(self) -> None:
        self.steps: list[int] = []
        self.stages: list[str] = []  # of each step
        self.values: dict[str, Tensor] = {}  # by layer: (len(steps), planes, kh, kw), on the CPU
        # Steps, stages, batches as loggers count them, and filters by layer, on the device.
        self._waiting: list[tuple[int, str, int, dict[str, Tensor]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._chosen = choose_layers(pl_module, self.layer)
        self._every = self.every_n_steps or trainer.log_every_n_steps or 1  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self._distance(trainer.global_step) == 0:
            self._record(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # It may be the last step, which is kept; weight averaging changes the filters after it.
        self._record(trainer, pl_module)
        self._collect()

    def state_dict(self) -> dict[str, Any]:
        self._collect()
        return super().state_dict()

    def _distance(self, step: int) -> int:
        """Number of steps between two records in a run of ``step`` steps."""
        distance = self._every
        while step > distance * MOST_POINTS:
            distance *= 2
        return distance

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._chosen or self.folder is None:
            return
        last = self._waiting[-1][0] if self._waiting else self.steps[-1] if self.steps else -1
        if trainer.global_step > last:  # an optimizer step may take several batches
            filters = {name: layer.filters() for name, layer in self._chosen.items()}
            self._waiting.append((trainer.global_step, stage_of(pl_module), trainer.fit_loop.total_batch_idx, filters))
        if len(self._waiting) > MOST_POINTS:  # an epoch may be infinite
            self._collect()

    def _collect(self) -> None:
        """Move waiting records from the device to the CPU and log their statistics."""
        if not self._waiting:
            return
        steps, stages, batches, waiting = zip(*self._waiting, strict=True)
        self._waiting = []
        self.steps, self.stages = [*self.steps, *steps], [*self.stages, *stages]
        distance = self._distance(steps[-1])
        kept = [index for index, step in enumerate(self.steps) if step % distance == 0 or step == steps[-1]]
        for name in waiting[0]:
            values = torch.stack([filters[name] for filters in waiting]).float().cpu()
            self._log(name, batches, values)
            self.values[name] = torch.cat([*([self.values[name]] if name in self.values else []), values])[kept]
        self.steps, self.stages = [self.steps[index] for index in kept], [self.stages[index] for index in kept]

    def _log(self, layer: str, batches: Sequence[int], values: Tensor) -> None:
        deviations, means = torch.std_mean(values, dim=(-2, -1), correction=0)
        for writer in self.writers:
            for name, measure in (("mean", means), ("std", deviations)):
                for batch, planes in zip(batches, measure.tolist(), strict=True):
                    for plane, value in enumerate(planes if batch >= 0 else ()):  # no batch before training
                        writer.add_scalar(f"filters/{layer}/plane{plane}/{name}", value, batch)

    def draw(self, trainer: Trainer) -> None:
        self._collect()
        if not self.steps or self.folder is None:
            return
        for name, values in self.values.items():
            file = "filters" if self.layer is None else f"filters_{name}"
            symbol = self._chosen[name].filter_symbol
            figure = draw_filters(self.steps, self.stages, values, symbol, name)
            self.show(file, figure, trainer.fit_loop.total_batch_idx)
            places = [tuple(place) for place in torch.ones_like(values[0]).nonzero().tolist()]
            rows = [
                dict(zip(("step", "plane", "row", "column", "value"), (step, *place, value), strict=True))
                for step, elements in zip(self.steps, values.flatten(1).tolist(), strict=True)
                for place, value in zip(places, elements, strict=True)
            ]
            self.write(file, rows)


def draw_filters(steps: list[int], stages: list[str], values: Tensor, symbol: str, layer: str) -> Figure:
    """Plot the elements of filters against steps, one panel per plane, with the mean of each plane dotted.

    Args:
        steps: (T,) optimizer steps.
        stages: (T,) the stage of each step.
        values: (T, planes, kh, kw); at most the first eight planes are drawn.
        symbol: symbol of the filters, such as ``W`` or ``|M|``.
        layer: name of the layer.
    """
    count, (rows, columns) = min(values.shape[1], MOST_PANELS), values.shape[2:]
    height = -(-count // 2)
    figure = Figure(figsize=(8, 1.2 + 1.9 * height), dpi=120, layout="constrained")
    panels = figure.subplots(height, min(count, 2), sharex=True, sharey=True, squeeze=False).flatten()
    for plane, axes in enumerate(panels[:count]):
        for row, column in product(range(rows), range(columns)):
            colour, dash = COLOURS[row % len(COLOURS)], DASHES[column % len(DASHES)]
            label = f"row {row}, column {column}"
            axes.plot(steps, values[:, plane, row, column], dash, color=colour, linewidth=1.2, label=label)
        axes.plot(steps, values[:, plane].mean(dim=(-2, -1)), ":", color="black", linewidth=2, label="mean")
        mark_stages(axes, steps, stages, labels=plane == 0)
        axes.set_title(f"plane {plane}", fontsize="medium")
        axes.grid(alpha=0.25)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(labelbottom=plane >= count - 2)
    for axes in panels[count:]:
        axes.remove()
    more = f" (first {count} of {values.shape[1]} planes)" if count < values.shape[1] else ""
    figure.suptitle(f"layer {layer}{more}", fontsize="medium")
    figure.supxlabel("optimizer step", fontsize="medium")
    figure.supylabel(f"element of {symbol}", fontsize="medium")
    if rows * columns <= 9:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, fontsize="small", loc="outside right center")
    return figure
