"""The picture of a comparison."""

import math
from collections import defaultdict
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from pcnn_lightning.reports.compare.groups import Group

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#7F7F7F")
"""Colors of Okabe and Ito, which color-blind readers can tell apart, with gray for their yellow, too faint for a
line."""
STYLES = [(colour, marker) for marker in ("", "o", "s", "^") for colour in COLOURS]
GREY = "0.3"
UNITS = {"accuracy": "accuracy (%)", "cross_entropy": "cross-entropy (nats)", "loss": "loss (nats)"}


def draw_groups(groups: Sequence[Group], metric: str = "accuracy") -> Figure:
    """Plot curves against epochs: training solid, validation dashed, a color per group, dotted where a stage changes.

    Of several runs, this is their mean over the epochs that all of them have, with a band of one standard deviation to
    either side. Cross-entropy is plotted beside ``metric``: it is the only loss that does not depend on the weights of
    the others.
    """
    panels = [
        name
        for name in dict.fromkeys((metric, "cross_entropy"))
        if any(run.curve(f"val/{name}") for group in groups for run in group.runs)
    ]
    styled = list(zip(groups, STYLES, strict=False))
    labels = [fill(group.label, 90, break_on_hyphens=False) for group in groups]
    columns = 2 if len(groups) > 2 and max(map(len, labels)) <= 40 else 1
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    figure = Figure(figsize=(8, 3.9 + 0.2 * math.ceil(lines)), dpi=120, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for group, (colour, marker) in styled:
            _draw_curves(axes, group, name, colour, marker)
        axes.set(xlabel="epoch", ylabel=UNITS.get(name, name))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        if "accuracy" not in name and axes.dataLim.y1 > 10 * axes.dataLim.minposy:  # the loss fell by a decade
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_ylim(axes.get_ylim())  # those of the curves, as a band may reach down to 0
        for group, (colour, _) in styled:
            _draw_bands(axes, group, name, colour)
        changes: dict[float, list[str]] = defaultdict(list)
        for group, (colour, _) in styled:
            for epoch, _ in group.changes():
                changes[epoch].append(colour)
        for epoch, colours in changes.items():  # gray where several groups change at once
            axes.axvline(epoch, color=colours[0] if len(colours) == 1 else GREY, linewidth=1, linestyle=":")
    what = dict.fromkeys(change for group in groups for _, change in group.changes())
    strokes: dict[str, Any] = {"training": "-", "validation": "--"} | dict.fromkeys(what, ":")
    kinds: list[Artist] = [Line2D([], [], color=GREY, linestyle=dash, label=label) for label, dash in strokes.items()]
    if any(len(group.runs) > 1 for group in groups):
        kinds.append(Patch(color=GREY, alpha=0.2, linewidth=0, label="± 1 standard deviation"))
    figure.legend(handles=kinds, loc="outside upper center", ncols=len(kinds), frameon=False)
    own = [Line2D([], [], color=colour, marker=marker, label="run") for _, (colour, marker) in styled]
    names = figure.legend(handles=own, loc="outside lower center", ncols=columns, frameon=False)
    for text, label in zip(names.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)  # a legend would drop _names and read $ as mathematics
    return figure


def _draw_curves(axes: Axes, group: Group, name: str, colour: str, marker: str) -> None:
    for split, dash in (("train", "-"), ("val", "--")):
        points = group.curve(f"{split}/{name}")
        values = [_scale(name) * sample.mean for sample in points.values()]
        shape = "." if len(points) == 1 else marker  # a line with one point is invisible
        sparse = max(1, len(points) // 8)
        axes.plot(list(points), values, dash, color=colour, linewidth=1.4, marker=shape, markersize=5, markevery=sparse)


def _draw_bands(axes: Axes, group: Group, name: str, colour: str) -> None:
    for split in ("train", "val") if len(group.runs) > 1 else ():
        points = group.curve(f"{split}/{name}")
        low, high = (
            [_scale(name) * (sample.mean + sign * sample.std) for sample in points.values()] for sign in (-1, 1)
        )
        axes.fill_between(list(points), low, high, color=colour, alpha=0.15, linewidth=0)


def _scale(name: str) -> int:
    return 100 if "accuracy" in name else 1
