"""Distribution of the latent weights C, epoch by epoch (figures 3.14 and 3.15)."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from pcnn_lightning.callbacks.drawing import BLUE, ORANGE, DrawingCallback, choose_layers, layers_of, stage_of
from pcnn_lightning.checks import check_integer
from pcnn_lightning.layers import QuantizedConv2d

STATISTICS = ("mean", "mean_abs", "std_abs", "bimodality")


class KernelHistograms(DrawingCallback):
    """Record the distribution of the latent weights C of each 1-bit layer.

    A quantization loss, such as the projection loss of PCNN, pulls C of a binary layer towards ±mean|C|: the histogram
    splits into two lobes, and the spread of |C| shrinks. In a ternary layer there is a lobe at zero as well.

    TensorBoard shows a histogram ``kernels/<layer>`` over epochs and four scalars per layer: ``mean``, ``mean_abs``,
    ``std_abs`` (the standard deviation of |C|) and ``bimodality``, which is Sarle's coefficient (skewness² + 1) /
    kurtosis of C: 1 for two points, 5/9 for a uniform and 1/3 for a Gaussian distribution. ``kernels.csv`` holds the
    same scalars.

    Two figures show the first 1-bit layer at the end of each stage and of the run: ``kernels_last``, the latest
    histogram, and ``kernels_over_epochs``, up to six histograms. If ``layer`` is given, there are two of each layer
    that it names, with its name appended. A resumed run continues its records.

    Args:
        every_n_epochs: record epochs 0, n, 2n, ..., the last epoch of the run, and that of a stage whose end is
            planned.
        bins: number of bins of a histogram, which spans -max|C| to max|C|.
        layer: path of the layer to draw in ``model.net``, such as ``features.stage1.0.conv``, or a pattern of several,
            such as ``features.stage*.0.conv``; None takes the first 1-bit layer.

    Raises:
        ValueError: if ``every_n_epochs`` or ``bins`` is too small.
        InputError: when training starts, if there is no 1-bit layer of that name.
    """

    recorded = ("rows", "histograms")

    def __init__(self, every_n_epochs: int = 1, bins: int = 64, layer: str | None = None) -> None:
        super().__init__()
        check_integer("every_n_epochs", every_n_epochs, 1)
        check_integer("bins", bins, 2)
        self.every_n_epochs, self.bins, self.layer = every_n_epochs, bins, layer
        self._drawn: Collection[str] = ()

    def begin_anew(self) -> None:
        self.rows: list[dict[str, Any]] = []
        """One row per epoch and layer: ``epoch``, ``stage``, ``layer`` and ``STATISTICS``."""
        self.histograms: list[dict[str, Any]] = []
        """The rows of the layers to draw, with ``batch`` (as loggers count them), ``limit`` (max|C|) and ``counts``."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._drawn = choose_layers(pl_module, self.layer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is None:
            return
        stage = stage_of(pl_module)
        if self.rows and self.rows[-1]["stage"] != stage:
            self.draw(trainer)  # the end of the previous stage
        layers = layers_of(pl_module)
        if layers and self._is_due(trainer, pl_module):
            self._record(trainer, stage, layers)

    def _is_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        planned = (trainer.max_epochs, getattr(pl_module, "stage_end", None))
        is_last = trainer.should_stop or trainer.global_step == trainer.max_steps
        return is_last or trainer.current_epoch + 1 in planned or trainer.current_epoch % self.every_n_epochs == 0

    def _record(self, trainer: Trainer, stage: str, layers: Mapping[str, QuantizedConv2d]) -> None:
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        measured = torch.stack([statistics(weight) for weight in weights.values()]).tolist()
        if not all(0 < limit < math.inf for *_, limit in measured):
            return  # all zero, or diverged, which the module reports
        place = {"epoch": trainer.current_epoch, "stage": stage}
        scalars: dict[str, float] = {}
        batch = trainer.fit_loop.total_batch_idx
        for (name, weight), (*values, limit) in zip(weights.items(), measured, strict=True):
            row = {**place, "layer": name, **dict(zip(STATISTICS, values, strict=True))}
            counts = count(weight, limit, self.bins).tolist()
            self.rows.append(row)
            if name in self._drawn:
                self.histograms.append({**row, "batch": batch, "limit": limit, "counts": counts})
            scalars |= {f"kernels/{name}/{statistic}": row[statistic] for statistic in STATISTICS}
            for writer in self.writers:
                writer.add_histogram_raw(
                    f"kernels/{name}",
                    min=-limit,
                    max=limit,
                    num=weight.numel(),
                    sum=weight.numel() * row["mean"],
                    sum_squares=weight.numel() * (row["mean_abs"] ** 2 + row["std_abs"] ** 2),
                    bucket_limits=edges(limit, self.bins),
                    bucket_counts=[0, *counts],  # the first bucket ends where the first bin begins
                    global_step=batch,
                )
        self.log_scalars(trainer, scalars)

    def draw(self, trainer: Trainer) -> None:
        if self.folder is None or not self.rows:
            return
        for layer in self._drawn:
            end = "" if self.layer is None else f"_{layer}"
            histograms = [histogram for histogram in self.histograms if histogram["layer"] == layer]
            batch = histograms[-1]["batch"]
            self.show(f"kernels_last{end}", draw_kernels(histograms[-1]), batch)
            self.show(f"kernels_over_epochs{end}", draw_kernels_over_epochs(histograms), batch)
        self.write("kernels", self.rows)


def statistics(weight: Tensor) -> Tensor:
    """Compute ``STATISTICS`` and max|C| of ``weight``: (5,), on its device."""
    mean, magnitude = weight.mean(), weight.abs()
    standardised = (weight - mean) / weight.std(correction=0)
    bimodality = (standardised.pow(3).mean().square() + 1) / standardised.pow(4).mean()
    return torch.stack([mean, magnitude.mean(), magnitude.std(correction=0), bimodality, magnitude.max()])


def count(weight: Tensor, limit: float, bins: int) -> Tensor:
    """Count the elements in each of ``bins`` from ``-limit`` to ``limit``: (bins,), on the weight's device."""
    # Not torch.histc, which trainer.deterministic forbids on a GPU.
    places = (weight.flatten() / limit + 1) * (bins / 2)
    return torch.bincount(places.long().clamp(0, bins - 1), minlength=bins)


def edges(limit: float, bins: int) -> list[float]:
    """The ``bins + 1`` edges of the bins of :func:`count`."""
    return [limit * (2 * index / bins - 1) for index in range(bins + 1)]


def draw_kernels(histogram: dict[str, Any]) -> Figure:
    """Plot the distribution of C in a layer, with ±mean|C| marked (figure 3.14).

    Args:
        histogram: an entry of :attr:`KernelHistograms.histograms`.
    """
    figure = Figure(figsize=(7, 4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(*_density(histogram), fill=True, color=BLUE, alpha=0.8)
    for side in (-1, 1):
        label = f"±mean|C| = ±{histogram['mean_abs']:.3g}" if side > 0 else None
        axes.axvline(side * histogram["mean_abs"], color=ORANGE, linewidth=1.5, linestyle="--", label=label)
    axes.set(xlabel="C, learned kernel element (no unit)", ylabel="density (per unit of C)")
    axes.set_title(f"{histogram['layer']}, {_when(histogram)}", loc="left", fontsize="medium")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return figure


def draw_kernels_over_epochs(histograms: list[dict[str, Any]], panels: int = 6) -> Figure:
    """Plot the distribution of C in a layer from the first to the last recorded epoch (figure 3.15).

    Args:
        histograms: entries of :attr:`KernelHistograms.histograms`.
        panels: maximum number of histograms to draw, evenly spaced.
    """
    panels = min(panels, len(histograms))
    chosen = [histograms[index * (len(histograms) - 1) // max(panels - 1, 1)] for index in range(panels)]
    figure = Figure(figsize=(7, 1.2 + 0.8 * panels), dpi=140, layout="constrained")
    for axes, histogram in zip(figure.subplots(panels, sharex=True, squeeze=False).flat, chosen, strict=True):
        axes.stairs(*_density(histogram), fill=True, color=BLUE, alpha=0.8)
        for side in (-1, 1):
            axes.axvline(side * histogram["mean_abs"], color=ORANGE, linewidth=1.2, linestyle="--")
        axes.set_yticks([])
        axes.spines[["left", "top", "right"]].set_visible(False)
        spread = f"spread of |C|\n{histogram['std_abs']:.3g}"
        when = _when(histogram).replace(", ", "\n")
        axes.text(-0.01, 0, when, transform=axes.transAxes, ha="right", va="bottom", fontsize="small")
        axes.text(1.01, 0, spread, transform=axes.transAxes, ha="left", va="bottom", fontsize="small")
    axes.set_xlabel("C, learned kernel element (no unit); dashed: ±mean|C|")
    figure.supylabel("density (each panel on its own scale)", fontsize="medium")
    figure.suptitle(str(chosen[0]["layer"]), fontsize="medium")
    return figure


def _density(histogram: dict[str, Any]) -> tuple[list[float], list[float]]:
    counts, limit = histogram["counts"], histogram["limit"]
    width = 2 * limit / len(counts)
    return [value / (sum(counts) * width) for value in counts], edges(limit, len(counts))


def _when(histogram: dict[str, Any]) -> str:
    return f"epoch {histogram['epoch']}, {histogram['stage']}".removesuffix(", ")
