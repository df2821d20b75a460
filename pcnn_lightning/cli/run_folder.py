"""The folders of runs: where ``last`` and ``best`` are, and which folder a resumed run continues."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from pcnn_lightning.callbacks.stage_checkpoint import LAST, RECORD, best_checkpoint
from pcnn_lightning.errors import InputError

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in the folder of a run."""


def find_checkpoint(word: str, callbacks: Sequence[Any], folders: Sequence[Path]) -> Path:
    """The checkpoint ``last`` or ``best`` of the newest run that has one.

    Args:
        word: ``last`` or ``best``.
        callbacks: the callbacks of the Trainer; a ``dirpath`` that is set is the only place to look in.
        folders: folders that hold runs, ``version_N``.

    Raises:
        InputError: if there is none; Lightning would train from scratch.
    """
    saving = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    if not saving:
        raise InputError(f"--ckpt_path {word}: there is no such checkpoint in the run's folder: checkpoint is null")
    given = [Path(callback.dirpath) for callback in saving if callback.dirpath]
    places = given or [run / CHECKPOINTS for folder in folders for run in (*reversed(versions(folder)), folder)]
    for place in places:
        found = place / LAST if word == "last" else best_checkpoint(place)
        if found is not None and found.is_file():
            return found
        if found is not None and word == "best":  # the record has outlived its file
            raise InputError(f"--ckpt_path best: {place / RECORD} names {found.name}, which is gone")
    raise InputError(f"--ckpt_path {word}: there is no such checkpoint in {', '.join(map(str, given or folders))}")


def versions(folder: Path) -> list[Path]:
    """The folders ``version_N`` in ``folder``, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("version_*") if (match := _VERSION.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def next_version(folder: Path) -> Path:
    """The folder of a new run in ``folder``."""
    newest = versions(folder)[-1:]
    return folder / f"version_{int(newest[0].name.removeprefix('version_')) + 1 if newest else 0}"


def requeued_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that Lightning has written when SLURM requeued a job; None if there is none."""
    found = [path for place in (folder, *versions(folder)) for path in place.glob("hpc_ckpt_*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def folders_of(path: Path, checkpoint: dict[str, Any]) -> list[Path]:
    """The folders of logs of the run that wrote a checkpoint: by its place, then by its own record."""
    by_place = [folder for folder in path.resolve().parents[:2] if _VERSION.fullmatch(folder.name)]
    return [*by_place, *(Path(folder) for folder in checkpoint["one_bit"].get("log_dirs", []))]


def continue_logs(loggers: Sequence[Logger], folders: Sequence[Path], first_batch: int | None) -> None:
    """Let loggers write on into the folders of a run, if these are theirs and no version is set.

    Args:
        loggers: the loggers of the Trainer.
        folders: the folders of the run.
        first_batch: the batch of the run that training goes on with, from which TensorBoard drops what the run has
            logged before it was killed; None if nothing is trained.
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
                break


_VERSION = re.compile(r"version_(\d+)")
