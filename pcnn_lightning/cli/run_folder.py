"""The folders of runs: where ``last`` and ``best`` are, and which folder a resumed run continues."""

import csv
import io
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from pcnn_lightning.callbacks.stage_checkpoint import LAST, RECORD, best_checkpoint
from pcnn_lightning.checkpoints import load_checkpoint
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in the folder of a run."""
CONFIG = "config.yaml"
"""Name of the configuration in the folder of a run that trains."""


def find_checkpoint(word: str, callbacks: Sequence[Any], run_dir: Path, to_train: bool = False) -> Path:
    """The checkpoint ``last`` or ``best`` of the newest run that has one, or of the run that ``run_dir`` names.

    Args:
        word: ``last`` or ``best``.
        callbacks: the callbacks of the Trainer; a ``dirpath`` that is set is the only place to look in.
        run_dir: a folder of runs, or one of them, ``version_N``.
        to_train: whether training is to go on from it; a newer run that has none is then not passed over.

    Raises:
        InputError: if there is none; Lightning would train from scratch.
    """
    saving = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    if not saving:
        raise InputError(f"--ckpt_path {word}: there is no such checkpoint in the run's folder: checkpoint is null")
    given = [Path(callback.dirpath) for callback in saving if callback.dirpath]
    places = given or [run / CHECKPOINTS for run in (*reversed(versions(run_dir)), run_dir)]
    for place in places:
        found = place / LAST if word == "last" else best_checkpoint(place)
        if found is not None and found.is_file():
            return found
        if found is not None and word == "best":  # the record has outlived its file
            raise InputError(f"--ckpt_path best: {place / RECORD} names {found.name}, which is gone")
        if to_train and not given and (place.parent / CONFIG).exists():
            raise InputError(
                f"--ckpt_path {word}: the newest run, {place.parent}, ended before it saved a checkpoint: "
                "start it again without --ckpt_path, or name the checkpoint of an earlier run"
            )
    raise InputError(f"--ckpt_path {word}: there is no such checkpoint in {', '.join(map(str, given or [run_dir]))}")


def versions(folder: Path) -> list[Path]:
    """The folders ``version_N`` in ``folder``, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("version_*") if (match := _VERSION.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def begin_run(run_dir: Path) -> Path:
    """Make the folder of a new run: the next ``version_N`` in ``run_dir``, or ``run_dir`` if that is its name.

    Runs that begin at the same time get different folders.

    Raises:
        InputError: if ``run_dir`` names a run that there is already.
    """
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # the other processes are told by it
    if _VERSION.fullmatch(run_dir.name):
        if is_first and ((run_dir / CONFIG).exists() or (run_dir / CHECKPOINTS).exists()):
            raise InputError(
                f"run_dir: {run_dir} is a run already: go on with it by --ckpt_path last, "
                f"or begin another one in {run_dir.parent}"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        return run_dir
    while True:
        newest = versions(run_dir)[-1:]
        own = run_dir / f"version_{int(newest[0].name.removeprefix('version_')) + 1 if newest else 0}"
        if not is_first:
            return own
        with suppress(FileExistsError):
            own.mkdir(parents=True)
            return own


def requeued_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of this SLURM job, which has been requeued; None if there is none.

    Lightning writes ``hpc_ckpt_N.ckpt`` when SLURM announces the end of the job; if a node fails, there is only
    ``last.ckpt``.

    Raises:
        InputError: if Lightning would take the checkpoint of another job from ``folder``.
    """
    places = (folder, *versions(folder))
    saved = [path for place in places for path in place.glob("hpc_ckpt_*.ckpt")]
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        saved += [path for place in places if (path := place / CHECKPOINTS / LAST).is_file()]
    for path in sorted(saved, key=lambda path: path.stat().st_mtime, reverse=True):
        if load_checkpoint(str(path))["one_bit"].get("slurm_job") == os.environ.get("SLURM_JOB_ID"):
            return path
    for path in folder.glob("hpc_ckpt_*.ckpt"):
        raise InputError(f"{path} is of another SLURM job: name it with --ckpt_path to go on from it, or remove it")
    return None


def folders_of(path: Path, checkpoint: dict[str, Any]) -> list[Path]:
    """The folders of the run that wrote a checkpoint: by its place, then by its own record."""
    by_place = [folder for folder in path.resolve().parents[:2] if _VERSION.fullmatch(folder.name)]
    recorded = (Path(folder) for folder in checkpoint["one_bit"].get("log_dirs", []))
    return [*by_place, *(folder for folder in recorded if folder.is_dir())]


def continue_logs(loggers: Sequence[Logger], folders: Sequence[Path], first_batch: int | None) -> None:
    """Let loggers write into the folders of a run, if these are theirs and no version is set.

    Args:
        loggers: the loggers of the Trainer.
        folders: the folders of the run.
        first_batch: the batch of the run that training goes on with, from which TensorBoard drops what the run has
            logged before it was killed; None if nothing is dropped.
    """
    for logger in loggers:
        if not isinstance(logger, (TensorBoardLogger, CSVLogger)) or logger._version is not None:
            continue
        root = Path(logger.root_dir).expanduser().resolve()
        for folder in folders:
            match = _VERSION.fullmatch(folder.name)
            if match and folder.resolve().parent == root and folder.is_dir():
                logger._version = int(match[1])
                if isinstance(logger, TensorBoardLogger):
                    logger._kwargs["purge_step"] = first_batch
                else:
                    _continue_csv(logger, first_batch)
                break


def _continue_csv(logger: CSVLogger, first_batch: int | None) -> None:
    """Let a logger add to its ``metrics.csv``, which it would begin anew."""
    path = Path(logger.log_dir) / _Continued.NAME_METRICS_FILE
    if not path.is_file() or rank_zero_only.rank > 0:  # type: ignore[attr-defined]
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or ())
    if first_batch is not None:
        rows = [row for row in rows if int(row["step"]) < first_batch]  # what the run logged before it was killed
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())
    logger._experiment = _Continued(logger.log_dir)
    logger._experiment.metrics_keys = names


class _Continued(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Nothing is removed, unlike by a new writer."""


_VERSION = re.compile(r"version_(\d+)")
