"""Image folders with one subfolder per class."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcnn_lightning.checks import check_path
from pcnn_lightning.data.base import Split
from pcnn_lightning.data.encoded import EncodedImages
from pcnn_lightning.data.layout import EXTENSIONS, agreed_classes, existing_splits, image_files
from pcnn_lightning.data.sources import Files, Source


class ImageFolder(EncodedImages):
    """Custom images in ``root/train/<class>/…`` and, optionally, ``root/val`` and ``root/test`` with the same layout.

    Small datasets are decoded once and held in memory; large ones, such as ImageNet, are read from disk by
    ``num_workers`` processes. Without ``val``, part of ``train`` is held out for validation; ``test`` is never used
    for model selection.

    Without ``root``, images of ``predict_dir`` can be predicted, if ``classes`` or ``num_classes`` is given. The
    command line takes these, ``image_size``, ``in_memory``, ``grayscale``, ``mean`` and ``std`` from the packed file or
    checkpoint that ``--ckpt_path`` names, unless they are given.

    Args:
        root: folder of the dataset.
        predict_dir: folder of the images to predict, at any depth; None takes ``root/test``.
        num_classes: number of classes, with which the folders must agree. It lets ``summary`` do without images.
        classes: names of the classes and their folders, by label; None takes the folders' names in sorted order.
        kwargs: see :class:`~pcnn_lightning.data.encoded.EncodedImages`.

    Raises:
        ValueError: if an argument is of the wrong type or out of range.
        InputError: if the folder has a different layout, or its splits have different classes.
    """

    def __init__(
        self,
        root: str = "data",
        predict_dir: str | None = None,
        num_classes: int | None = None,
        classes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if predict_dir is not None:
            check_path("predict_dir", predict_dir)
        super().__init__(root, num_classes=num_classes, classes=classes, **kwargs)
        self.predict_dir = None if predict_dir is None else Path(predict_dir).expanduser()

    def find_classes(self, num_classes: int | None) -> tuple[list[str], str]:
        if num_classes is not None and not existing_splits(self.root):
            return [str(label) for label in range(num_classes)], ""
        return agreed_classes(self.root), f"{self.root} has class folders for"

    def find_files(self) -> dict[Split, tuple[Source, Tensor]]:
        agreed_classes(self.root, self.classes)
        found: dict[Split, tuple[Source, Tensor]] = {}
        for split in existing_splits(self.root):
            by_class = [image_files(self.root / split / name, required=False) for name in self.classes]
            counts = torch.tensor([len(files) for files in by_class])
            self.check_counts(split, counts, f"holds no images ({', '.join(EXTENSIONS)})")
            files = Files([file for files in by_class for file in files])
            found[split] = files, torch.arange(self.num_classes).repeat_interleave(counts)
        return found

    @cached_property
    def files_to_predict(self) -> Source | None:
        return None if self.predict_dir is None else Files(image_files(self.predict_dir))

    def folder_to_predict(self) -> Path:
        return self.root / "test" if self.predict_dir is None else self.predict_dir
