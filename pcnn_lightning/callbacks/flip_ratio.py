"""Fraction of the signs of 1-bit kernels that change per epoch."""

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pcnn_lightning.callbacks.drawing import DrawingCallback, layers_of, mark_stages, stage_of


class FlipRatio(DrawingCallback):
    """Record the fraction of signs that change per epoch in the quantized kernels (such as D of PCNN or Q of MCN).

    Signs are -1, 0 or +1: in a ternary layer, a change to or from zero counts like any other, and in the first binary
    epoch every zero changes. The first epoch is compared with the kernels at its start. The scalars are
    ``flips/<layer>``, ``flips/<part>`` for each stage of the network, such as ``features.stage1``, and ``flips/total``;
    likewise ``zeros/...``, the fraction of zeros in ternary layers. ``flips.csv`` and the figure ``flips`` are written
    at the end of the run. A resumed run continues its records.
    """

    def begin_anew(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        """Rows of ``epoch``, ``stage``, and fractions by name in ``flips`` and ``zeros``."""
        self._signs: dict[str, Tensor] = {}  # by layer, at the end of the last epoch: -1, 0 and 1 (int8)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is not None and not self._signs:
            self._signs = signs_of(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is None or not self._signs:
            return
        before, self._signs = self._signs, signs_of(pl_module)
        counts = []
        for name, signs in self._signs.items():
            changed = signs != before[name].to(signs.device)[: len(signs)]  # unpacked signs are padded
            counts.append(torch.stack([changed.sum(), (signs == 0).sum()]))
        flipped, zero = torch.stack(counts).T.tolist()  # synchronizes with the device once
        sizes = {name: len(signs) for name, signs in self._signs.items()}
        flips, zeros = dict(zip(sizes, flipped, strict=True)), dict(zip(sizes, zero, strict=True))
        for name, layer in layers_of(pl_module).items():
            if layer.stage != "ternary":
                del zeros[name]
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "stage": stage_of(pl_module)}
        row |= {"flips": shares(flips, sizes), "zeros": shares(zeros, sizes)}
        self.epochs.append(row)
        scalars = {f"{kind}/{name}": share for kind in ("flips", "zeros") for name, share in row[kind].items()}
        self.log_scalars(trainer, scalars)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "signs": {name: pack(signs) for name, signs in self._signs.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]
        self._signs = {name: unpack(packed) for name, packed in state_dict["signs"].items()}

    def draw(self, trainer: Trainer) -> None:
        if self.folder is None or not self.epochs:
            return
        self.show("flips", draw_flips(self.epochs), trainer.fit_loop.total_batch_idx)
        rows = [
            {
                "epoch": row["epoch"],
                "stage": row["stage"],
                "layer": name,
                "flips": share,
                "zeros": row["zeros"].get(name),
            }
            for row in self.epochs
            for name, share in row["flips"].items()
        ]
        self.write("flips", rows)


def signs_of(pl_module: LightningModule) -> dict[str, Tensor]:
    """Flattened signs of each layer's quantized kernels, -1, 0 and 1 (int8), on its device."""
    layers = layers_of(pl_module)
    return {name: layer.quantized_weight().sign().to(torch.int8).flatten() for name, layer in layers.items()}


def pack(signs: Tensor) -> Tensor:
    """Pack four signs (int8) per byte, on the CPU; the last byte is padded with zero signs."""
    fours = (F.pad(signs, (0, -len(signs) % 4)) + 1).to(torch.uint8).view(-1, 4)
    return (fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6).cpu()


def unpack(packed: Tensor) -> Tensor:
    """Unpack the signs (int8) that :func:`pack` packed, including the padding."""
    return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten().to(torch.int8) - 1


def shares(counts: dict[str, int], sizes: dict[str, int]) -> dict[str, float]:
    """Fractions by layer, by part of the network and in ``total``, from counts by layer.

    The part of a layer is its path up to one component after the common prefix of all layers: ``features.stage1`` for
    ``features.stage1.0.conv``.
    """
    common = os.path.commonpath([name.replace(".", "/") for name in sizes])
    depth = common.count("/") + 2 if common else 1
    sums: dict[str, tuple[int, int]] = {}
    for name, count in counts.items():
        part = ".".join(name.split(".")[:depth])
        for group in dict.fromkeys(("total", part, name)):  # only once if a layer is a part itself
            known, size = sums.get(group, (0, 0))
            sums[group] = (known + count, size + sizes[name])
    return {group: count / size for group, (count, size) in sums.items()}


def draw_flips(epochs: list[dict[str, Any]]) -> Figure:
    """Plot the fraction of changed signs against epochs: in total, and by layer, colored by depth.

    Args:
        epochs: entries of :attr:`FlipRatio.epochs`.
    """
    names = list(epochs[-1]["flips"])
    layers = [name for name in names if not any(other.startswith(f"{name}.") for other in names) and name != "total"]
    figure = Figure(figsize=(7, 4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["viridis_r"](np.linspace(0.15, 1, len(layers)))  # without yellow, which is hard to see on white
    mark = "." if len(epochs) == 1 else ""  # a line needs two epochs
    for name, colour in zip(layers, colours, strict=True):
        _plot(axes, epochs, name, color=colour, linewidth=0.9, marker=mark)
    _plot(axes, epochs, "total", color="black", linewidth=2.2, marker=mark, label="all layers")
    mark_stages(axes, [row["epoch"] for row in epochs], [row["stage"] for row in epochs])
    # Fractions fall from one half at the switch to 1e-4 at the end and may be 0, which has no logarithm.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 3 * max(axes.get_ylim()[1], 0.01))  # leaves room for the names of the stages
    axes.set(xlabel="epoch", ylabel="signs changed in an epoch (%)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    depth = ScalarMappable(Normalize(0.5, len(layers) + 0.5), ListedColormap(colours))
    ticks = MaxNLocator(8, integer=True, min_n_ticks=1)
    figure.colorbar(depth, ax=axes, label="1-bit layer, counted from the input", ticks=ticks)
    return figure


def _plot(axes: Axes, epochs: list[dict[str, Any]], name: str, **style: Any) -> None:
    axes.plot([row["epoch"] for row in epochs], [100 * row["flips"][name] for row in epochs], **style)
