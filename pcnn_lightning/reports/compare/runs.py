"""Reading of runs: the tables that a run leaves in its folder."""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pcnn_lightning.errors import InputError
from pcnn_lightning.files import LOSSES, SUMMARY, SWEEP, TESTED, TIMES, read_rows
from pcnn_lightning.reports.compare.settings import read_settings, read_sweep

Row = dict[str, Any]
"""The row of a table: metrics and the epoch are numbers, and missing if they are not."""


@dataclass
class Run:
    """One run.

    Attributes:
        folder: where its tables are.
        epochs: a row per epoch, with ``epoch``, ``stage`` and metrics.
        settings: its settings as text or, in a sweep, the values that the sweep gave it.
        tests: a row per tested checkpoint, with ``stage`` and metrics.
        sweep: the folder of the sweep that it belongs to.
        megabits: Mbit of its parameters at inference, if recorded.
        minutes: how long its epochs took together, if recorded.
        devices: what it ran on.
    """

    folder: Path
    epochs: list[Row]
    settings: dict[str, str]
    tests: list[Row] = field(default_factory=list)
    sweep: Path | None = None
    megabits: float | None = None
    minutes: float | None = None
    devices: Sequence[str] = ()

    def curve(self, name: str, stage: str | None = None) -> dict[int, float]:
        """The finite values of a metric by epoch, in ``stage`` or in all stages."""
        return {
            row["epoch"]: row[name]
            for row in self.epochs
            if math.isfinite(row.get(name, math.nan)) and stage in (None, row["stage"])
        }

    def result(self, metric: str, stage: str) -> dict[str, float]:
        """What there is of a stage: its epochs, the first best validation with its epoch, the last values and test."""
        validations, training = self.curve(f"val/{metric}", stage), self.curve(f"train/{metric}", stage)
        better = max if "accuracy" in metric else min
        found: dict[str, float] = {}
        if epochs := sum(row["stage"] == stage for row in self.epochs):
            found["epochs"] = epochs
        if validations:
            found["at"], found["best"] = better(validations.items(), key=lambda point: point[1])
        tests = [row.get(f"test/{metric}", math.nan) for row in self.tests if row.get("stage") == stage]
        last = {"val": validations.values(), "train": training.values(), "test": filter(math.isfinite, tests)}
        return found | {name: known[-1] for name, values in last.items() if (known := [*values])}

    def changes(self) -> list[tuple[float, str]]:
        """Position of each change of stage on the epoch axis, and its label."""
        return [
            (new["epoch"] - 0.5, f"{old['stage']} to {new['stage']}")
            for old, new in pairwise(self.epochs)
            if old["stage"] != new["stage"]
        ]


def read_runs(path: Path, metric: str = "accuracy") -> tuple[list[Run], int]:
    """Read the run in ``path`` or, if that holds a sweep, all its runs; also count those that have not begun.

    Raises:
        InputError: if there is no run with validations of ``metric``, or ``sweep.yaml`` is damaged.
    """
    if not (path / SWEEP).exists():
        return [read_run(path, metric)], 0
    sweep = read_sweep(path / SWEEP)
    begun = [name for name in sweep if any((path / name).rglob(LOSSES))]
    if not begun:
        raise InputError(f"{path / SWEEP}: none of its {len(sweep)} runs has begun")
    runs: list[Run] = []
    for name in begun:
        with suppress(InputError):  # it has not been validated yet
            runs.append(replace(read_run(path / name, metric), settings=sweep[name], sweep=path))
    if not runs:
        read_run(path / begun[0], metric)  # says what there is
    return runs, len(sweep) - len(runs)


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
        epochs = [row for row in map(_parsed, read_rows(folder / LOSSES)) if {"epoch", "stage"} <= row.keys()]
        names = {name for row in epochs for name in row if "/" in name}
        if f"val/{metric}" in names:
            tests = [_parsed(row) for row in read_rows(folder / TESTED)]
            run = Run(folder, epochs, read_settings(folder), tests, megabits=_megabits(folder))
            return replace(run, **_times(folder))
        held |= names
    raise InputError(f"{path} holds no run with val/{metric}; what it holds: {', '.join(sorted(held)) or 'nothing'}")


def _version(folder: Path) -> tuple[list[int], float]:
    return [int(number) for number in re.findall(r"\d+", folder.name)], (folder / LOSSES).stat().st_mtime


def _parsed(row: dict[str, str]) -> Row:
    """The columns of a row that are what they should be."""
    found: Row = {}
    for name, cell in row.items():
        with suppress(ValueError, TypeError):
            found[name] = float(cell) if "/" in name else int(cell) if name == "epoch" else str(cell)
    return found


def _megabits(folder: Path) -> float | None:
    """Mbit of the parameters at inference, from the total, which is the last row."""
    with suppress(IndexError, KeyError, ValueError, TypeError):
        total = read_rows(folder / SUMMARY)[-1]
        return sum(bits * int(total[f"parameters_{bits}bit"]) for bits in (1, 2, 32)) / 1e6
    return None


def _times(folder: Path) -> Row:
    rows = read_rows(folder / TIMES)
    with suppress(KeyError, ValueError, TypeError):
        minutes = sum(float(row["seconds"]) for row in rows) / 60
        if rows and math.isfinite(minutes):
            return {"minutes": minutes, "devices": list(dict.fromkeys(str(row["device"]) for row in rows))}
    return {}
