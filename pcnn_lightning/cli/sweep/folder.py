"""The folder of a sweep: its runs with their configurations, and what has become of each."""

import json
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from pcnn_lightning.callbacks.stage_checkpoint import LAST
from pcnn_lightning.cli.run_folder import CHECKPOINTS, CONFIG, versions
from pcnn_lightning.cli.sweep.plan import Plan, Run
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import LOSSES, SWEEP, TESTED, check_writable, read_rows, write_whole

try:
    import fcntl
except ImportError:  # Windows: sweeps are not kept apart
    fcntl = None  # type: ignore[assignment]

COMMAND, LOG, FINISHED, LOCK = "command.txt", "log.txt", "finished.json", "lock"
"""Names of files: command, output and results of a run; and what a process locks while it is at work in a folder."""


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, plan: Plan, runs: Sequence[Run], configs: Sequence[str]) -> None:
        """Require that the folder is new, or that of a sweep over the same axes, with the same settings.

        Args:
            plan: the sweep.
            runs: its runs.
            configs: their complete configurations, in YAML.

        Raises:
            InputError: names what is in the way.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out: {self.path} is a file, not a folder")
        others = [] if not self.path.exists() else [one.name for one in self.path.iterdir() if one.name != LOCK]
        if SWEEP not in others:
            if others:
                raise InputError(f"out: {self.path} holds {others[0]}, which is of no sweep: name another folder")
            return
        record = self._recorded()
        if {*record["grid"]} != {*plan.grid}:
            axes, own = (", ".join(grid) for grid in (record["grid"], plan.grid))
            raise InputError(
                f"out: {self.path} belongs to another sweep, over {axes}, and not over {own}: name another folder"
            )
        for run, config in zip(runs, configs, strict=True):
            there = self.path / run.name / CONFIG
            if there.is_file() and (changed := _difference(there.read_text(encoding="utf-8"), config)):
                raise InputError(f"out: {there} belongs to another sweep: {changed}: name another folder")
        if record["arguments"] != plan.shared:
            before = shlex.join(record["arguments"]) or "none"
            raise InputError(f"out: {self.path} belongs to a sweep with other arguments, {before}: name another folder")
        for key, axis in plan.grid.items():
            for label, arguments in axis.items():
                if (there := record["grid"][key].get(label, arguments)) != arguments:
                    before, after = (shlex.join(one) or "nothing" for one in (there, arguments))
                    raise InputError(
                        f"out: {self.path} belongs to another sweep: {key}={label} sets {before} there and {after} "
                        "here: name another folder, or give the value another name"
                    )

    def _recorded(self) -> dict[str, Any]:
        record = self.path / SWEEP
        try:
            found = yaml.safe_load(record.read_text(encoding="utf-8"))
            arguments, grid, runs = [*found["arguments"]], dict(found["grid"]), dict(found["runs"])
            return {"arguments": arguments, "grid": {key: dict(axis) for key, axis in grid.items()}, "runs": runs}
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            raise InputError(f"out: {record} is damaged: name another folder") from None

    def write(self, plan: Plan, runs: Sequence[Run], configs: Sequence[str], commands: Sequence[str]) -> None:
        """Write the record of the sweep, and a folder with configuration and command for each run."""
        check_writable(self.path)
        before = self._recorded() if (self.path / SWEEP).exists() else {"grid": {}, "runs": {}}
        record = {
            "arguments": plan.shared,
            "grid": {key: before["grid"].get(key, {}) | axis for key, axis in plan.grid.items()},
            "runs": before["runs"] | {run.name: run.values for run in runs},
        }
        text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=1000)
        write_whole(self.path / SWEEP, text.encode())
        for run, config, command in zip(runs, configs, commands, strict=True):
            folder = self.path / run.name
            if not (folder / CONFIG).exists():
                write_whole(folder / COMMAND, f"{command}\n".encode())
                write_whole(folder / CONFIG, config.encode())


@contextmanager
def locked(folder: Path, message: str, patience: float = 0) -> Iterator[int | None]:
    """Hold the lock of a folder, as do processes that inherit its descriptor.

    Args:
        folder: the folder.
        message: what to say if it is held.
        patience: seconds to wait for another holder, such as a run that ends because its sweep was killed.

    Raises:
        InputError: if it is held for longer.
    """
    if fcntl is None:
        yield None
        return
    check_writable(folder)
    with (folder / LOCK).open("w") as file:
        end = time.monotonic() + patience
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() >= end:
                raise InputError(message)
            time.sleep(0.2)
        yield file.fileno()


def _difference(before: str, after: str) -> str | None:
    """The first setting that differs between two configurations; their folder may have moved."""
    if before == after:  # most often, and reading YAML is slow
        return None
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


def results_of(run: Path) -> dict[str, str] | None:
    """The results of a run that has finished: the test of its best checkpoint; None if it has not."""
    try:
        found: dict[str, str] = json.loads((run / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def finish(run: Path) -> None:
    """Record that a run has been trained and tested."""
    version = newest_version(run)
    assert version is not None
    results = read_rows(version / TESTED)[-1]  # of the best checkpoint, which has just been tested
    write_whole(run / FINISHED, json.dumps(results, indent=2).encode())


def epochs_done(run: Path) -> int:
    """The number of epochs that a run has trained."""
    version = newest_version(run)
    if version is None or not (version / LOSSES).is_file():
        return 0
    return len((version / LOSSES).read_text(encoding="utf-8").splitlines()) - 1


def can_go_on(run: Path) -> bool:
    """Whether a run has a checkpoint to go on from."""
    version = newest_version(run)
    return version is not None and (version / CHECKPOINTS / LAST).is_file()


def clear(run: Path) -> None:
    """Remove what a run left that was cut off before it could save anything."""
    version = newest_version(run)
    if version is not None and not any(version.rglob("*.ckpt")):
        shutil.rmtree(version)
