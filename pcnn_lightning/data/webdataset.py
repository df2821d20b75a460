"""Images in tars, in the layout of WebDataset."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pcnn_lightning.checks import check_path
from pcnn_lightning.data.base import Split
from pcnn_lightning.data.encoded import EncodedImages
from pcnn_lightning.data.sources import Source
from pcnn_lightning.data.tars import Index, find_shards, in_order, read_indexes
from pcnn_lightning.errors import InputError

CLASSES = "classes.txt"
"""Name of the file with the names of the classes, one a line, in ``root``."""


class WebDataset(EncodedImages):
    """Images in the tars of WebDataset, read in place in any order, with all that holds for folders of images.

    A tar holds an image (``.jpg``, ``.png``, ``.webp``, or of the other kinds that folders may hold) and its label for
    each key, the path up to the first dot of its last part. The label is an integer: the text of a member ending in
    ``.cls``, or ``label`` or ``cls`` in one ending in ``.json``. Each tar is scanned once, and its index is kept in a
    file.

    The order of the images is that of labels and names, however they are dealt out to tars. So a run is that of a
    folder of the same images, and tars may be packed anew between two runs, or between two halves of one, as long as no
    two images of a split have the same label and name.

    Args:
        root: folder of the dataset.
        train: tars of the training images: a folder of tars, a tar, or several by ``{000..146}``, ``*`` or ``?``; a
            list of these; relative to ``root``. None takes the folder ``root/train``.
        val: tars of the validation images, likewise; None takes ``root/val`` if it exists.
        test: tars of the test images, likewise; None takes ``root/test`` if it exists.
        num_classes: number of classes; None takes the number of ``classes``, or the largest label plus one if each
            label up to it has images.
        classes: names of the classes, by label; None takes the lines of ``root/classes.txt`` if it exists.
        cache_dir: folder for the indexes of the tars; None keeps each beside its tar, or in
            ``~/.cache/pcnn_lightning`` if that folder is read-only.
        kwargs: see :class:`~pcnn_lightning.data.encoded.EncodedImages`.

    Raises:
        ValueError: if an argument is of the wrong type or out of range.
        InputError: if there are no tars, or ``num_classes`` is not the number of classes.
    """

    suffix = ".tar"
    """Suffix of the files that are looked for in folders."""

    def __init__(
        self,
        root: str = "data",
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        num_classes: int | None = None,
        classes: list[str] | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._patterns: dict[Split, Any] = {"train": train, "val": val, "test": test}
        for name, value in self._patterns.items():
            _check_patterns(name, value)
        if cache_dir is not None:
            check_path("cache_dir", cache_dir)
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        super().__init__(root, num_classes=num_classes, classes=classes, **kwargs)

    def prepare_data(self) -> None:
        """Index the tars, by all cores; in each of several processes, the indexes are then read.

        Raises:
            InputError: if there are no tars, or one cannot be used.
        """
        _ = self._files

    def find_classes(self, num_classes: int | None) -> tuple[list[str], str]:
        file = self.root / CLASSES
        if file.is_file():
            try:
                names = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{file} must be UTF-8 text: {error}") from None
            if not all(names) or len(set(names)) < len(names):
                raise InputError(f"{file} must have a different name in each line")
            return names, f"{file} has"
        if num_classes is None:
            labels = self.labels_found()
            num_classes = labels[-1] + 1
            if num_classes > len(labels):
                missing = next(label for label, found in enumerate(labels) if label != found)
                raise InputError(
                    f"{self.root} has {len(labels):,} labels up to {labels[-1]}, and no image of label {missing}: "
                    f"set --data.num_classes {num_classes}, if that is as it should be"
                )
        return [str(label) for label in range(num_classes)], ""

    def labels_found(self) -> list[int]:
        """Find the labels of all splits, in ascending order."""
        of_tars = [index.labels for indexes in self._indexed.values() for index in indexes.values()]
        found: list[int] = np.unique(np.concatenate(of_tars)).tolist()
        return found

    @cached_property
    def _indexed(self) -> dict[Split, dict[str, Index]]:
        """The indexes of the tars of each split."""
        tars = self.tars()
        found = read_indexes([tar for of_split in tars.values() for tar in of_split], self.cache_dir)
        return {split: {tar: found[tar] for tar in of_split} for split, of_split in tars.items()}

    def find_files(self) -> dict[Split, tuple[Source, Tensor]]:
        found: dict[Split, tuple[Source, Tensor]] = {
            split: in_order(indexes) for split, indexes in self._indexed.items()
        }
        del self._indexed  # it would take as much memory again
        return found

    def tars(self) -> dict[Split, list[str]]:
        """Find the tars of each split that there is.

        Raises:
            InputError: if there are none.
        """
        return self.shards()

    def shards(self) -> dict[Split, list[str]]:
        """Find the files of the dataset, by split.

        Raises:
            InputError: if there are none.
        """
        found: dict[Split, list[str]] = {}
        for split, patterns in self._patterns.items():
            if patterns is not None or (self.root / split).is_dir():
                found[split] = find_shards(self.root, split if patterns is None else patterns, self.suffix)
        if not found:
            expected = f"{self.root / 'train' / '<name>'}{self.suffix}"
            raise InputError(
                f"{self.root} has no folder train, val or test: expected {expected}, or set --data.train, --data.val "
                "and --data.test to where the files are"
            )
        return found


def _check_patterns(name: str, value: Any) -> None:
    """Require a path or a list of paths."""
    paths = value if isinstance(value, (list, tuple)) else [value]
    if value is not None and not (paths and all(isinstance(path, (str, os.PathLike)) for path in paths)):
        raise ValueError(f"{name} must be a path or a list of paths, but got {value!r}")
