"""Where the files of a run are; writing checkpoints whole, reading them, and what is wrong with one in one line."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from pcnn_lightning.errors import InputError
from pcnn_lightning.files import is_packed, write_whole


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and reads them without running code from them.

    Lightning's own moves them from a temporary folder, which may copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; to a remote one, ``scheme://...``, as Lightning does.

        Raises:
            InputError: if the file cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint as :func:`load_checkpoint` does, whatever the other arguments and the environment say."""
        return load_checkpoint(str(path))


def folder_of_run(trainer: Trainer) -> Path:
    """The folder of a run, the same in all processes, which must all ask for it.

    That is the trainer's ``run_folder``, which a run of the command line has, and otherwise the folder in which
    Lightning makes ``checkpoints``: of the version of the first logger or, without loggers, ``default_root_dir``.
    """
    folder: Path | None = getattr(trainer, "run_folder", None)
    if folder is None:
        folder = Path(trainer.default_root_dir)
        for logger in trainer.loggers[:1]:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            folder = Path(logger.save_dir or folder, str(logger.name), version)
    return Path(trainer.strategy.broadcast(str(folder)))


def use_atomic_io(trainer: Trainer) -> None:
    """Let a trainer read and write checkpoints by :class:`AtomicCheckpointIO`, unless another class is set."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint of this package onto the CPU, without running code from it.

    Raises:
        InputError: if there is no such file, or it is remote, damaged or not written by pcnn_lightning.
    """
    if "://" in path:
        raise InputError(f"a checkpoint must be a local file, but got {path}: download it first")
    if is_packed(path):
        raise InputError(f"{path} is a packed network: it cannot be trained; test it with the flag --ckpt_path")
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"a checkpoint must be a file, but {path} is none")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare checksums
            if (record := archive.testzip()) is not None or any(entry.external_attr for entry in archive.infolist()):
                raise zipfile.BadZipFile(f"{record or 'the directory'} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        raise InputError(f"{path} is damaged or no checkpoint: it cannot be read ({type(error).__name__})") from None
    parts = ("state_dict", "hyper_parameters", "one_bit")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(part), dict) for part in parts):
        raise InputError(f"{path} is not a checkpoint that pcnn_lightning wrote")
    return checkpoint


def check_same_tensors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Compare the tensors of a model with those of a checkpoint.

    Raises:
        InputError: names the first tensors that are missing, unexpected or of another shape.
    """
    differences = [f"{name} is missing" for name in expected.keys() - found.keys()]
    differences += [f"{name} is not in the model" for name in found.keys() - expected.keys()]
    differences += [
        f"{name} is {tuple(found[name].shape)} in the checkpoint and {tuple(expected[name].shape)} in the model"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(f"the checkpoint does not fit the model: {'; '.join(sorted(differences)[:3])}{more}")
