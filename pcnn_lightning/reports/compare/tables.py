"""The table of a comparison, for terminals, as CSV and as Markdown."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len

from pcnn_lightning.reports.compare.drawing import UNITS
from pcnn_lightning.reports.compare.groups import Group, Sample
from pcnn_lightning.reports.compare.settings import Published, shown
from pcnn_lightning.tables import filled, terminal_width, text_table

HEADERS = {
    "n": "n",
    "stage": "stage",
    "epochs": "epochs",
    "best": "best\nval",
    "at": "at\nepoch",
    "val": "last\nval",
    "train": "last\ntrain",
    "test": "test",
    "megabits": "Mbit",
    "minutes": "minutes",
    "published": "published",
}
"""Columns, after the run."""
OF_GROUPS = ("n", "stage", "epochs", "best", "test", "megabits", "minutes", "published")
OF_SINGLE_RUNS = ("stage", "epochs", "best", "at", "val", "train", "test", "published")
SAMPLES = ("epochs", "best", "at", "val", "train", "test", "megabits", "minutes")

Line = dict[str, Any]
"""A line of the table by column: samples, text, and None where there is nothing."""


@dataclass
class ResultTable:
    """The results of groups, with a line per stage. Accuracies are in per cent.

    Attributes:
        groups: the rows.
        metric: the metric that is compared.
        averaged: whether columns are those of groups, with means and deviations, or those of single runs.
        published: published accuracies by the label of a group.
        notes: lines below the table.
    """

    groups: Sequence[Group]
    metric: str = "accuracy"
    averaged: bool = False
    published: Mapping[str, Published] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.lines = [self._lines(group) for group in self.groups]
        self.title = UNITS.get(self.metric, self.metric)
        filled_in = {name for lines in self.lines for line in lines for name, value in line.items() if value}
        self.columns = [name for name in (OF_GROUPS if self.averaged else OF_SINGLE_RUNS) if name in filled_in]

    @property
    def is_partial(self) -> bool:
        """Whether some cell is the mean of fewer runs than its row has."""
        cells = [(line, line.get(name)) for lines in self.lines for line in lines for name in self.columns]
        return any(isinstance(value, Sample) and 0 < value.n < line["n"] for line, value in cells)

    def _lines(self, group: Group) -> list[Line]:
        scale = 100 if "accuracy" in self.metric else 1
        lines: list[Line] = []
        for stage in group.stages:
            results = [run.result(self.metric, stage) for run in group.runs]
            line: Line = {"n": len(group.runs), "stage": shown(stage)}
            for name in ("epochs", "at"):
                line[name] = Sample(result[name] for result in results if name in result)
            for name in ("best", "val", "train", "test"):
                line[name] = Sample(scale * result[name] for result in results if name in result)
            lines.append(line)
        # What belongs to whole runs stands in the line of their last stage.
        lines[-1]["megabits"] = Sample(run.megabits for run in group.runs if run.megabits is not None)
        lines[-1]["minutes"] = Sample(run.minutes for run in group.runs if run.minutes is not None)
        lines[-1]["published"] = self.published.get(group.label)
        return lines

    def to_text(self) -> str:
        """Format for a terminal."""
        # Where a table with narrow gaps is too wide as well, deviations go below their means.
        for gap, between in ((2, " "), (1, " "), (1, "\n")):
            rows = [["run", *(HEADERS[name] for name in self.columns)]]
            for group, lines in zip(self.groups, self.lines, strict=True):
                cells = [_equally_high([self._cell(line, name, between) for name in self.columns]) for line in lines]
                label = group.label if self.averaged or group.runs[0].sweep else _with_folder(group)
                rows.append([label, *("\n".join(column) for column in zip(*cells, strict=True))])
            table = text_table(rows, gap=gap)
            if max(map(cell_len, table.splitlines())) <= terminal_width():
                break
        notes = "".join(f"\n{filled(note)}" for note in self.notes)
        return f"{filled(self.title)}\n\n{table}" + (f"\n{notes}" if notes else "")

    def to_markdown(self) -> str:
        """Format as a Markdown table between a line with the metric and the notes."""
        header = ["run", *(HEADERS[name].replace("\n", " ") for name in self.columns)]
        rows = [header, ["---", *("---:" for _ in self.columns)]]
        for group, lines in zip(self.groups, self.lines, strict=True):
            for at, line in enumerate(lines):
                cells = ["" if at else group.label, *(self._cell(line, name) for name in self.columns)]
                rows.append([_escaped(cell) for cell in cells])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return "\n\n".join([_escaped(self.title), table, *map(_escaped, self.notes)])

    def to_csv(self) -> str:
        """Format as CSV: of each column the exact mean, standard deviation and number of values."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        samples = [HEADERS[name].replace("\n", "_") for name in SAMPLES]
        names = [f"{name}_{of}" for name in samples for of in ("mean", "std", "n")]
        writer.writerow(["run", "metric", "n", "stage", *names, "devices", "published", "source"])
        for group, lines in zip(self.groups, self.lines, strict=True):
            for line in lines:
                cells: list[float | str] = []
                for name in SAMPLES:
                    found = line.get(name)
                    numbers = (found.mean, found.std, found.n) if found else ("", "", "")
                    cells += ["" if value != value else value for value in numbers]  # NaN: there is none
                published = line.get("published") or Published("", "")
                beside = ["; ".join(group.devices), published.accuracy, shown(published.source)]
                writer.writerow([group.label, self.title, line["n"], line["stage"], *cells, *beside])
        return file.getvalue().rstrip("\n")

    def _cell(self, line: Line, name: str, between: str = " ") -> str:
        """The text of a cell: nothing if the value stands in another line, and a dash if there is none."""
        if name not in line:
            return ""
        value = line[name]
        if isinstance(value, Published):
            return value.accuracy
        if not value:
            return "-"
        if not isinstance(value, Sample):
            return str(value)
        if name in ("epochs", "at"):
            return f"{value.least:g}" if value.least == value.most else f"{value.least:g}–{value.most:g}"
        # A deviation over a few runs is not known to more than one digit.
        digits = {"megabits": 2, "minutes": 1}.get(name, (2 if "accuracy" in self.metric else 4) - self.averaged)
        text = f"{value.mean:.3g}" if name == "megabits" and value.mean < 1 else f"{value.mean:.{digits}f}"
        if value.n > 1 and name not in ("megabits", "minutes"):
            text += f"{between}± {value.std:.{digits}f}"
        return text if value.n == line["n"] else f"{text} ({value.n})"


def _equally_high(cells: Sequence[str]) -> list[str]:
    height = max(cell.count("\n") for cell in cells)
    return [cell + "\n" * (height - cell.count("\n")) for cell in cells]


def _with_folder(group: Group) -> str:
    folder = shown(str(group.runs[0].folder))
    return folder if folder.endswith(group.label) else f"{group.label}\n{folder}"


def _escaped(text: str) -> str:
    """Escape what Markdown would take for markup."""
    return re.sub(r"([\\`*<|\[])", r"\\\1", text)
