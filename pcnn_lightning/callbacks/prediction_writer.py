"""Writes predictions to a CSV file."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from pcnn_lightning.checks import check_path
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import check_writable, write_whole


class PredictionWriter(BasePredictionWriter):
    r"""Write a CSV file with one line per image: its file or index, the predicted label and that label's probability.

    The file is UTF-8 and is written whole or not at all. Bytes of a name that are not UTF-8 are written as escapes,
    such as ``caf\udce9.png``.

    Args:
        path: the file to write.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        super().__init__("epoch")
        check_path("path", path)
        self.path = Path(path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for name in ("predict_names", "classes"):
            if not hasattr(data, name):
                raise InputError(f"{type(data).__name__} has no {name}, which is needed to write predictions")
        if self.path.is_dir():
            raise InputError(f"cannot write predictions to {self.path}: it is a folder")
        try:
            check_writable(self.path.parent)
        except InputError as error:
            raise InputError(f"cannot write predictions to {self.path}: {error}") from error

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        indices = [index for batch in batch_indices[0] for index in batch]
        labels = [label for batch in predictions for label in batch["label"].tolist()]
        probabilities = [value for batch in predictions for value in batch["probability"].tolist()]
        rows = list(zip(indices, labels, probabilities, strict=True))
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, rows)
            rows = sorted(row for share in shares for row in share)
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            names, classes = data.predict_names(), data.classes
            text = io.StringIO(newline="")
            writer = csv.writer(text)
            writer.writerow(["image", "label", "probability"])
            for index, label, probability in rows:
                writer.writerow([names[index], classes[label], f"{probability:.6f}"])
            write_whole(self.path, _encoded(text.getvalue()))
            print(f"{len(rows)} predictions in {_encoded(str(self.path)).decode()}")


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")
