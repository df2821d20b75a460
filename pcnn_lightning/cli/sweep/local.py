"""Runs of a sweep on this machine, several at a time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich import get_console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pcnn_lightning.cli.run_folder import CONFIG
from pcnn_lightning.cli.sweep.folder import LOG, epochs_done, results_of
from pcnn_lightning.tables import duration

PARENT = "PCNN_LIGHTNING_SWEEP"
"""Set in the environment of a run whose sweep holds its standard input open for as long as it is alive."""
SECONDS = 0.5
"""From one look at the runs to the next."""


@dataclass
class _Active:
    run: Path
    process: subprocess.Popen[bytes]
    slot: int
    began: float
    log_start: int
    """Bytes that its log had before, from earlier attempts."""


def run_all(runs: Sequence[Path], jobs: int, lock: int | None) -> int:
    """Train and test runs, each in a process of its own; a failed one does not stop the others.

    Cores and GPUs are shared out among the processes. If this one ends for whatever reason, they end after their
    batch, with a checkpoint.

    Args:
        runs: folders of the runs that have not finished.
        jobs: how many run at a time.
        lock: descriptor of the lock of the sweep, for the processes to hold.

    Returns:
        The number of runs that failed.
    """
    waiting, active, failed = list(runs), dict[int, _Active](), dict[Path, str]()
    with _Line(runs) as line, ExitStack() as ending, _sigterm_raises():
        ending.callback(_end, active)
        while waiting or active:
            for slot in range(jobs):
                if waiting and slot not in active:
                    run = waiting.pop(0)
                    log_start = (run / LOG).stat().st_size if (run / LOG).exists() else 0
                    active[slot] = _Active(run, _start(run, slot, jobs, lock), slot, time.monotonic(), log_start)
            line.show(len(active))
            time.sleep(SECONDS)
            for one in [one for one in active.values() if one.process.poll() is not None]:
                del active[one.slot]
                if not line.report(one.run, one.process.returncode, time.monotonic() - one.began):
                    failed[one.run] = _reason(one.run / LOG, one.log_start)
    for run, reason in failed.items():
        print(f"failed: {run.name}: {reason} ({run / LOG})", file=sys.stderr)
    return len(failed)


def _start(run: Path, slot: int, jobs: int, lock: int | None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **_share(slot, jobs), PARENT: "1"}
    with (run / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pcnn_lightning", "sweep", "--run_dir", str(run)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )


def _share(slot: int, jobs: int) -> dict[str, str]:
    """The share of cores and GPUs that a process gets, as environment variables."""
    share = {}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    if jobs > 1 and (count := torch.cuda.device_count()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
        share["CUDA_VISIBLE_DEVICES"] = ",".join(visible[slot::jobs] or [visible[slot % count]])
    return share


def _end(active: dict[int, _Active]) -> None:
    """Let processes end after their batch, and wait for them; Ctrl-C again ends them at once."""
    for one in active.values():
        assert one.process.stdin is not None
        with suppress(OSError):
            one.process.stdin.close()
    try:
        for one in active.values():
            one.process.wait()
    except KeyboardInterrupt:
        for one in active.values():  # a process of several devices has others
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
        raise


def end_with_parent() -> None:
    """In the process of a run: raise SIGTERM when the process of its sweep lets go of the standard input."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written: it returns at the end
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get(PARENT) and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, so that it waits for its runs."""

    def end(*_: Any) -> NoReturn:
        error = SIGTERMException()
        error.how_to_go_on = "Run the same command again to go on with the sweep."  # type: ignore[attr-defined]
        raise error

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Line:
    """A line below what is printed: finished and running runs, and the time left; only in terminals."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self.total, self.finished = len(runs), 0
        self._epochs = {run: _length(run) for run in runs}
        self._at_first = {run: self._share_done(run) for run in runs}
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[left]}"), transient=True
        )
        self._task = TaskID(0)

    def __enter__(self) -> "_Line":
        self._is_shown = sys.stdout.isatty() or get_console().is_jupyter
        if self._is_shown:
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0, left="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            self._bar.stop()

    def show(self, running: int) -> None:
        """Show how far the sweep is, with ``running`` runs at a time."""
        if not self._is_shown:
            return
        done = sum(map(self._share_done, self._epochs))
        new = done - sum(self._at_first.values())
        left = (time.monotonic() - self._began) / new * (self.total - done) if new > 0 else None
        self._bar.update(
            self._task,
            completed=done / self.total,
            description=f"{self.finished} of {self.total} finished, {running} running",
            left="" if left is None else f"{duration(left)} left",
        )

    def report(self, run: Path, status: int, seconds: float) -> bool:
        """Print how a run ended, and return whether it succeeded."""
        self.finished += 1
        results = results_of(run)
        succeeded = status == 0 and results is not None
        accuracy = (results or {}).get("test/accuracy")
        how = f"test accuracy {100 * float(accuracy):.2f} %" if accuracy else "tested"
        said = f"{how}, {duration(seconds)}" if succeeded else f"failed, exit status {status}"
        line = f"[{self.finished}/{self.total}] {run.name}: {said}"
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        return succeeded

    def _share_done(self, run: Path) -> float:
        if results_of(run) is not None:
            return 1.0
        return min(epochs_done(run) / self._epochs[run], 0.99) if self._epochs[run] else 0.0


def _length(run: Path) -> int:
    epochs = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))["trainer"]["max_epochs"]
    return max(epochs or 0, 0)


def _reason(log: Path, start: int) -> str:
    """The last error in a log from byte ``start`` on; without one, its last line."""
    lines = log.read_bytes()[start:].decode(errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return next((line for line in reversed(said) if "error:" in line.lower()), said[-1] if said else "no output")
