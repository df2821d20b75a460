"""Flags of a tiny run, and what a command leaves behind."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pcnn_lightning.cli import OneBitCLI

DIGITS = ["--data=Digits", "--data.train_size=64", "--data.image_size=8", "--data.batch_size=32"]
NETWORK = [
    "--model=PCNN",
    "--model.backbone=wrn7",
    "--model.widths=[2,2,2,2]",
    "--model.projections=2",
    "--model.eta2=0.01",
]
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
TRAINING = [*NETWORK, *QUIET, "--trainer.max_epochs=1"]
FIT = ["fit", *DIGITS, *TRAINING]
KEEP = ["--checkpoint.dirpath=kept"]
SWITCH = ["--model.stage=ternary", "--stage_switch.epoch=1"]


class WrongLabels(LightningDataModule):
    """Declares three classes but has ``label`` among its labels 0, 1 and 2."""

    num_classes, in_channels = 3, 1

    def __init__(self, label: int) -> None:
        super().__init__()
        self.labels = torch.tensor([0, 1, 2, label])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), self.labels), batch_size=4)


class Run(NamedTuple):
    """The exit status and output of a command."""

    code: object
    out: str
    err: str
    cli: OneBitCLI | None

    def is_refused(self, *mentioned: str, code: int = 2) -> None:
        """Fail unless the command ended in one line that mentions all of these, but for how to go on."""
        __tracebackhide__ = True
        assert self.code == code, self.err
        assert self.err.startswith("pcnn_lightning: error: ")
        lines = [line for line in self.err.splitlines() if not line.startswith("To go on")]
        assert len(lines) == 1, f"more than one line:\n{self.err}"
        for what in mentioned:
            assert what in lines[0], f"{what!r} is not mentioned: {self.err}"

    def is_usage_error(self, *mentioned: str) -> None:
        """Fail unless the parser refused the command with a message that mentions all of these."""
        __tracebackhide__ = True
        assert self.code == 2, f"exit status {self.code}: {self.err}"
        assert "Traceback" not in self.err
        message = self.err.rpartition("error:")[2]
        for what in mentioned:
            assert what in message, f"{what!r} is not mentioned: {message}"


def in_folder(folder: Path) -> list[str]:
    """The flags that let a command find the checkpoints of ``folder`` by ``last`` and ``best``."""
    return [f"--checkpoint.dirpath={folder}"]


def make_folder(root: Path, counts: dict[str, int], splits: tuple[str, ...] = ("train", "test")) -> Path:
    """Write ``counts[class]`` random PNGs of 8×8 for each split."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def tensors_in(checkpoint: object) -> list[Tensor]:
    """All tensors of a checkpoint, including those of the optimizer."""
    if isinstance(checkpoint, Tensor):
        return [checkpoint]
    if isinstance(checkpoint, dict):
        return [tensor for value in checkpoint.values() for tensor in tensors_in(value)]
    if isinstance(checkpoint, list | tuple):
        return [tensor for value in checkpoint for tensor in tensors_in(value)]
    return []


def same_weights(one: LightningModule, other: LightningModule) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
