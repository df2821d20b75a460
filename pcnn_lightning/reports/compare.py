"""Comparison of finished runs: their curves in one figure, their best epochs in one table."""

import csv
import io
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from pcnn_lightning.errors import InputError
from pcnn_lightning.files import check_writable, write_whole
from pcnn_lightning.tables import filled, text_table

LOSSES, TESTED = "losses.csv", "test.csv"
"""Tables that ``LossCurves`` leaves in the folder of a run."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#7F7F7F")
"""Colors of Okabe and Ito, which color-blind readers can tell apart, with gray for their yellow, too faint for a
line."""
STYLES = [(colour, marker) for marker in ("", "o", "s", "^") for colour in COLOURS]
GREY = "0.3"
LONGEST_FILE = 2**18
"""Upper bound of the bytes in a file of settings; a larger one is not read."""
LONGEST = 1000
"""Upper bound of the characters in the label of a run, apart from its folder."""
UNITS = {"accuracy": "accuracy (%)", "cross_entropy": "cross-entropy (nats)", "loss": "loss (nats)"}

Row = dict[str, Any]
"""The row of a table: metrics and the epoch are numbers, and missing if they are not."""


@dataclass
class Run:
    """One run: its folder, the rows of its epochs and of its tests, and its settings."""

    folder: Path
    epochs: list[Row]
    settings: dict[str, str]
    label: str = ""
    tests: list[Row] = field(default_factory=list)

    def curve(self, name: str, stage: str | None = None) -> dict[int, float]:
        """The finite values of a metric by epoch, in ``stage`` or in all stages."""
        return {
            row["epoch"]: row[name]
            for row in self.epochs
            if math.isfinite(row.get(name, math.nan)) and stage in (None, row["stage"])
        }

    def results(self, metric: str) -> list[Row]:
        """A row per stage: the number of epochs, the first best validation with its epoch, the last values and test."""
        rows: list[Row] = []
        for stage in dict.fromkeys(row["stage"] for row in self.epochs):
            validations, training = self.curve(f"val/{metric}", stage), self.curve(f"train/{metric}", stage)
            better = max if "accuracy" in metric else min
            at, best = better(validations.items(), key=lambda point: point[1], default=(None, None))
            tests = [row[name] for row in self.tests if row.get("stage") == stage and (name := f"test/{metric}") in row]
            epochs = sum(row["stage"] == stage for row in self.epochs)
            last = {"val": [*validations.values()], "train": [*training.values()], "test": tests}
            values = {name: found[-1] if found else None for name, found in last.items()}
            rows.append({"stage": stage, "epochs": epochs, "best": best, "at": at, **values})
        return rows

    def changes(self) -> list[tuple[float, str]]:
        """Position of each change of stage on the epoch axis, and its label."""
        return [
            (new["epoch"] - 0.5, f"{old['stage']} to {new['stage']}")
            for old, new in pairwise(self.epochs)
            if old["stage"] != new["stage"]
        ]


def compare(runs: Sequence[str | Path], output: str | Path = "comparison.png", metric: str = "accuracy") -> str:
    """Plot the curves of several runs in one figure and return their best epochs as a table.

    Args:
        runs: folders of runs, such as ``runs/digits/version_0``. Of a folder that contains runs, the newest is taken.
        output: file to write the figure to, in the format of its suffix; PNG if it has none.
        metric: the metric to compare, recorded as ``train/...`` and ``val/...``. Higher is better if its name contains
            ``accuracy``, otherwise lower.

    Raises:
        InputError: if a folder holds no such run, or the figure cannot be written.
    """
    if not runs:
        raise InputError("no runs to compare: name at least one folder of logs")
    if len(runs) > len(STYLES):
        raise InputError(f"{len(runs)} runs cannot be told apart in one picture: name at most {len(STYLES)}")
    found = [read_run(Path(run), metric) for run in runs]
    for folder, times in Counter(run.folder.resolve() for run in found).items():
        if times > 1:
            raise InputError(f"{folder} is named {times} times: name each run's own version_N")
    label_runs(found)
    check_writable(Path(output).parent)
    image = io.BytesIO()
    try:
        draw_runs(found, metric).savefig(image, format=Path(output).suffix[1:] or "png")
    except (OSError, ValueError) as error:  # an unknown image format
        raise InputError(f"cannot write {output}: {error}") from error
    write_whole(Path(output), image.getbuffer())
    return table(found, metric)


def read_run(path: Path, metric: str = "accuracy") -> Run:
    """Read the run whose tables are in ``path``, or the newest run in the folders below it.

    Raises:
        InputError: if there is none with validations of ``metric``.
    """
    if not path.is_dir():
        raise InputError(f"{path}: there is no such folder")
    folders = [path] if (path / LOSSES).exists() else [file.parent for file in path.rglob(LOSSES)]
    if not folders:
        raise InputError(f"{path} holds no {LOSSES}, the table of a run (loss_curves), nor does a folder below it")
    held: set[str] = set()
    for folder in sorted(folders, key=_version, reverse=True):
        epochs = [row for row in read_rows(folder / LOSSES) if {"epoch", "stage"} <= row.keys()]
        names = {name for row in epochs for name in row if "/" in name}
        if f"val/{metric}" in names:
            return Run(folder, epochs, read_settings(folder), tests=read_rows(folder / TESTED))
        held |= names
    raise InputError(f"{path} holds no run with val/{metric}; what it holds: {', '.join(sorted(held)) or 'nothing'}")


def _version(folder: Path) -> tuple[list[int], float]:
    return [int(number) for number in re.findall(r"\d+", folder.name)], (folder / LOSSES).stat().st_mtime


def read_rows(file: Path) -> list[Row]:
    """Read the rows of a table; none if there is no such file."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        rows = list(csv.DictReader(line.replace("\0", "") for line in lines))
    return [_parsed(row) for row in rows]


def _parsed(row: dict[str, str]) -> Row:
    """The columns of a row that are what they should be."""
    found: Row = {}
    for name, cell in row.items():
        with suppress(ValueError, TypeError):
            found[name] = float(cell) if "/" in name else int(cell) if name == "epoch" else str(cell)
    return found


def read_settings(folder: Path) -> dict[str, str]:
    """Read the settings of a run as text, by name: model, hyperparameters, data, seed and length, as far as recorded.

    Files that cannot be read give no settings, whatever is in them.
    """
    config = _read_yaml(folder / "config.yaml")
    model, data, trainer = (_fields(config.get(part)) for part in ("model", "data", "trainer"))
    settings = {
        "model": _text(model.get("class_path")).rpartition(".")[2],
        **{name: _text(node) for name, node in _fields(model.get("init_args")).items()},
        **{name: _text(node) for name, node in _read_yaml(folder / "hparams.yaml").items()},  # of a TensorBoardLogger
        "data": _text(data.get("class_path")).rpartition(".")[2],
        **{f"data.{name}": _text(node) for name, node in _fields(data.get("init_args")).items()},
        "max_epochs": _text(trainer.get("max_epochs")),
        "seed_everything": _text(config.get("seed_everything")),
    }
    return {name: text for name, text in settings.items() if text and not name.startswith("_")}


def _read_yaml(file: Path) -> dict[str, yaml.Node]:
    """Read the fields of a YAML file as nodes: values made of them could be endless, or run code."""
    try:
        if not file.is_file() or file.stat().st_size > LONGEST_FILE:
            return {}
        return _fields(yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader))
    except Exception:  # yaml raises what it likes, and only labels need it, which can be folder names
        return {}


def _fields(node: yaml.Node | None) -> dict[str, yaml.Node]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}


def _text(node: yaml.Node | None) -> str:
    """The text of a value; of a collection, its first 200 pieces."""
    return "" if node is None else "".join(islice(_pieces(node), 200))


def _pieces(node: yaml.Node) -> Iterator[str]:
    """Yield the text of a value in pieces, which may never end: through an alias, a list can contain itself."""
    if isinstance(node, yaml.ScalarNode):
        try:
            yield f"{float(node.value):g}" if node.tag.endswith(":float") else node.value
        except ValueError:  # such as .inf
            yield node.value
        return
    mapping = isinstance(node, yaml.MappingNode)
    left, right = "{}" if mapping else "()" if node.tag.endswith("/tuple") else "[]"
    yield left
    for index, item in enumerate(node.value):
        *key, value = item if mapping else [item]
        yield ", " if index else ""
        for name in key:
            yield from _pieces(name)
            yield ": "
        yield from _pieces(value)
    yield right


def _shown(text: str) -> str:
    """Escape what cannot be printed."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def label_runs(runs: Sequence[Run]) -> None:
    """Label each run by the settings in which the runs differ, and by its folder where labels would be the same.

    A setting that only one family has is used if it differs within that family.
    """
    values: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name, value in run.settings.items():
            values[name].add(value)
    for run in runs:
        label = _shown(
            ", ".join(
                f"{name}={run.settings[name]}" for name in values if len(values[name]) > 1 and name in run.settings
            )
        )
        run.label = label if len(label) <= LONGEST else f"{label[:LONGEST]}..."
    times = Counter(run.label for run in runs)
    common = os.path.commonpath([run.folder.resolve().parent for run in runs])
    for run in runs:
        if not run.label or times[run.label] > 1:
            folder = _shown(run.folder.resolve().relative_to(common).as_posix())
            run.label = f"{run.label} ({folder})" if run.label else folder


HEADERS = {
    "stage": "stage",
    "epochs": "epochs",
    "best": "best\nval",
    "at": "at\nepoch",
    "val": "last\nval",
    "train": "last\ntrain",
    "test": "test",
}
"""Columns of the table, after the run."""


def table(runs: Sequence[Run], metric: str = "accuracy") -> str:
    """Format the results of each run: its label and folder, and a line per stage."""
    results = [run.results(metric) for run in runs]
    shown = [name for name in HEADERS if any(row[name] not in (None, "") for rows in results for row in rows)]
    lines = [["run", *(HEADERS[name] for name in shown)]]
    for run, rows in zip(runs, results, strict=True):
        folder = _shown(str(run.folder))
        columns = ([_say(row[name], metric) for row in rows] for name in shown)
        label = folder if folder.endswith(run.label) else f"{run.label}\n{folder}"
        lines.append([label, *("\n".join(column) for column in columns)])
    return f"{filled(UNITS.get(metric, metric))}\n\n{text_table(lines)}"


def _say(value: str | int | float | None, metric: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.2f}" if "accuracy" in metric else f"{value:.4f}"
    return str(value)


def draw_runs(runs: Sequence[Run], metric: str = "accuracy") -> Figure:
    """Plot curves against epochs: training solid, validation dashed, a color per run, dotted where a stage changes.

    Cross-entropy is plotted beside ``metric``: it is the only loss that does not depend on the weights of the others.
    """
    panels = [
        name for name in dict.fromkeys((metric, "cross_entropy")) if any(run.curve(f"val/{name}") for run in runs)
    ]
    styled = list(zip(runs, STYLES, strict=False))
    labels = [fill(run.label, 90, break_on_hyphens=False) for run in runs]
    columns = 2 if len(runs) > 2 and max(map(len, labels)) <= 40 else 1
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    figure = Figure(figsize=(8, 3.9 + 0.2 * math.ceil(lines)), dpi=120, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for run, (colour, marker) in styled:
            _draw_run(axes, run, name, colour, marker)
        axes.set(xlabel="epoch", ylabel=UNITS.get(name, name))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        if "accuracy" not in name and axes.dataLim.y1 > 10 * axes.dataLim.minposy:  # the loss fell by a decade
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        changes: dict[float, list[str]] = defaultdict(list)
        for run, (colour, _) in styled:
            for epoch, _ in run.changes():
                changes[epoch].append(colour)
        for epoch, colours in changes.items():  # gray where several runs change at once
            axes.axvline(epoch, color=colours[0] if len(colours) == 1 else GREY, linewidth=1, linestyle=":")
    what = dict.fromkeys(change for run in runs for _, change in run.changes())
    strokes: dict[str, Any] = {"training": "-", "validation": "--"} | dict.fromkeys(what, ":")
    kinds = [Line2D([], [], color=GREY, linestyle=dash, label=label) for label, dash in strokes.items()]
    figure.legend(handles=kinds, loc="outside upper center", ncols=len(kinds), frameon=False)
    own = [Line2D([], [], color=colour, marker=marker, label="run") for _, (colour, marker) in styled]
    names = figure.legend(handles=own, loc="outside lower center", ncols=columns, frameon=False)
    for text, label in zip(names.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)  # a legend would drop _names and read $ as mathematics
    return figure


def _draw_run(axes: Axes, run: Run, name: str, colour: str, marker: str) -> None:
    for split, dash in (("train", "-"), ("val", "--")):
        points = run.curve(f"{split}/{name}")
        values = [100 * value if "accuracy" in name else value for value in points.values()]
        shape = "." if len(points) == 1 else marker  # a line with one point is invisible
        sparse = max(1, len(points) // 8)
        axes.plot(list(points), values, dash, color=colour, linewidth=1.4, marker=shape, markersize=5, markevery=sparse)
