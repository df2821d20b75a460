"""The folder of a sweep: its runs with their configurations, and what has become of each."""

import csv
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from pcnn_lightning.callbacks.stage_checkpoint import LAST
from pcnn_lightning.cli.run_folder import CHECKPOINTS, CONFIG, versions
from pcnn_lightning.cli.sweep.plan import Run
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import check_writable, write_whole

try:
    import fcntl
except ImportError:  # Windows: sweeps are not kept apart
    fcntl = None  # type: ignore[assignment]

SWEEP, COMMAND, LOG, LOCK = "sweep.yaml", "command.txt", "log.txt", "lock"
"""Names of files: the runs of a sweep; the command and the output of a run; the lock of a sweep."""


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, runs: Sequence[Run], configs: Sequence[str]) -> None:
        """Require that the folder is new, or that of a sweep over the same axes, with the same settings.

        Args:
            runs: the runs of the sweep.
            configs: their complete configurations, in YAML.

        Raises:
            InputError: names what is in the way.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out: {self.path} is a file, and no folder")
        others = [] if not self.path.exists() else [one.name for one in self.path.iterdir() if one.name != LOCK]
        if SWEEP not in others:
            if others:
                raise InputError(f"out: {self.path} holds {others[0]}, which is not of a sweep: name another folder")
            return
        axes, own = {key for values in self.recorded().values() for key in values}, set(runs[0].values)
        if axes != own:
            raise InputError(
                f"out: {self.path} is of another sweep, over {', '.join(sorted(axes))}, and not over "
                f"{', '.join(sorted(own))}: name another folder"
            )
        for run, config in zip(runs, configs, strict=True):
            there = self.path / run.name / CONFIG
            if there.is_file() and (changed := _difference(there.read_text(encoding="utf-8"), config)):
                raise InputError(f"out: {there} is of another sweep: {changed}: name another folder")

    def recorded(self) -> dict[str, dict[str, Any]]:
        """The value of each axis, by the name of a run.

        Raises:
            InputError: if the record is damaged.
        """
        record = self.path / SWEEP
        try:
            runs = yaml.safe_load(record.read_text(encoding="utf-8"))["runs"]
            return {name: dict(values) for name, values in runs.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
            raise InputError(f"out: {record} is damaged: name another folder") from None

    def write(self, runs: Sequence[Run], configs: Sequence[str], commands: Sequence[str]) -> None:
        """Write the record of the sweep, and a folder with configuration and command for each run."""
        check_writable(self.path)
        before = self.recorded() if (self.path / SWEEP).exists() else {}
        own = {run.name: {key: _number(label) for key, label in run.values.items()} for run in runs}
        record = {"runs": before | own}
        text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=1000)
        write_whole(self.path / SWEEP, text.encode())
        for run, config, command in zip(runs, configs, commands, strict=True):
            folder = self.path / run.name
            if not (folder / CONFIG).exists():
                write_whole(folder / COMMAND, f"{command}\n".encode())
                write_whole(folder / CONFIG, config.encode())

    @contextmanager
    def locked(self, patience: float = 30) -> Iterator[int | None]:
        """Hold the lock of the sweep, which processes that inherit its descriptor hold as well.

        Args:
            patience: seconds to wait for another holder, such as a run that ends because its sweep was killed.

        Raises:
            InputError: if it is held for longer.
        """
        if fcntl is None:
            yield None
            return
        check_writable(self.path)
        with (self.path / LOCK).open("w") as file:
            end = time.monotonic() + patience
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > end:
                    raise InputError(f"out: another sweep is at work in {self.path}: wait for it, or stop it")
                time.sleep(0.2)
            os.set_inheritable(file.fileno(), True)
            yield file.fileno()


def _number(label: str) -> str | int | float:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(label)
    return label


def _difference(before: str, after: str) -> str | None:
    """The first setting that differs between two configurations; their folder may have moved."""
    first, second = (dict(_flat(yaml.safe_load(text))) for text in (before, after))
    for key in [*second, *(first.keys() - second.keys())]:
        if key != "run_dir" and first.get(key) != second.get(key):
            return f"{key} is {first.get(key)} there and {second.get(key)} here"
    return None


def _flat(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(config, Mapping):
        yield key, config
        return
    for name, value in config.items():
        yield from _flat(value, f"{key}.{name}" if key else str(name))


def newest_version(run: Path) -> Path | None:
    """The ``version_N`` of a run that counts; None if it has not begun."""
    return next(iter(reversed(versions(run))), None)


def test_results(run: Path) -> dict[str, str] | None:
    """The metrics of the last test of a run, which ends it; None if it has not ended."""
    version = newest_version(run)
    if version is None or not (version / "test.csv").is_file():
        return None
    with (version / "test.csv").open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))[-1]


def epochs_done(run: Path) -> int:
    """The number of epochs that a run has trained."""
    version = newest_version(run)
    if version is None or not (version / "losses.csv").is_file():
        return 0
    return len((version / "losses.csv").read_text(encoding="utf-8").splitlines()) - 1


def can_go_on(run: Path) -> bool:
    """Whether a run has a checkpoint to go on from."""
    version = newest_version(run)
    return version is not None and (version / CHECKPOINTS / LAST).is_file()


def clear(run: Path) -> None:
    """Remove what a run left that was cut off before it could save anything."""
    version = newest_version(run)
    if version is not None and not can_go_on(run):
        shutil.rmtree(version)
