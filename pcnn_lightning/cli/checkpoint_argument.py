"""``--ckpt_path``: the file behind it, and the model that the file describes."""

import json
from itertools import pairwise
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pcnn_lightning.callbacks import StageCheckpoint
from pcnn_lightning.callbacks.stage_checkpoint import RECORD
from pcnn_lightning.checkpoints import load_checkpoint
from pcnn_lightning.errors import InputError
from pcnn_lightning.families import FAMILIES

LINKED = {"num_classes": 10, "in_channels": 3}
"""Arguments that a model takes from its data, with their defaults."""


def checkpoint_argument(args: list[str]) -> str | None:
    """The file given as ``--ckpt_path FILE`` or ``--ckpt_path=FILE``, if any."""
    for argument, following in reversed(list(pairwise([*args, ""]))):  # the parser takes the last one
        if argument == "--ckpt_path" or argument.startswith("--ckpt_path="):
            path = argument.partition("=")[2] or following
            return None if path in ("best", "last", "null", "") else path
    return None


def model_config(path: str) -> str:
    """The model of a checkpoint, as a configuration in JSON."""
    checkpoint = load_checkpoint(path)
    hparams = {
        name: value
        for name, value in checkpoint["hyper_parameters"].items()
        if name not in LINKED and not name.startswith("_")
    }
    saved = checkpoint["one_bit"]
    class_path, family = saved.get("class_path"), FAMILIES.get(saved.get("family"))
    if family is not None and str(class_path).rpartition(".")[2] == family.module.rpartition(".")[2]:
        class_path = family.module  # where it is now, should the class have moved since
    return json.dumps({"model": {"class_path": class_path, "init_args": hparams}})


def packed_config(path: str) -> str:
    """The model of a packed file, as a configuration in JSON."""
    return json.dumps({"model": {"class_path": "pcnn_lightning.modules.PackedClassifier", "init_args": {"path": path}}})


def find_checkpoint(path: str | None, trainer: Trainer) -> str | None:
    """The file behind ``--ckpt_path``, which may also be ``best`` or ``last`` of the run's folder.

    Raises:
        InputError: if there is none; Lightning would train from scratch.
    """
    if path not in ("best", "last"):
        return path
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folders = [Path(callback.dirpath) for callback in callbacks if callback.dirpath]
    if path == "last":
        found = [file for folder in folders for file in folder.glob("last*.ckpt")]
        found.sort(key=lambda file: file.stat().st_mtime)
    else:
        best = [callback.best_checkpoint() for callback in callbacks if isinstance(callback, StageCheckpoint)]
        found = [Path(file) for file in best if file is not None]
    if not found:
        where = ", ".join(map(str, folders)) or "the run's folder: checkpoint is null"
        raise InputError(f"--ckpt_path {path}: there is no such checkpoint in {where}")
    if not found[-1].is_file():  # the record of the best has outlived its file
        folder, name = found[-1].parent, found[-1].name
        raise InputError(f"--ckpt_path {path}: {folder / RECORD} names {name}, which is gone")
    return str(found[-1])
