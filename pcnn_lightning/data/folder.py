"""Image folders with one subfolder per class."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcnn_lightning.checks import check_bool, check_path
from pcnn_lightning.data.base import ImageDataModule, Split
from pcnn_lightning.data.datasets import ImageSet, MemoryImages
from pcnn_lightning.data.decode import decode_all, image_files, image_size, subfolders
from pcnn_lightning.data.disk import DiskImages
from pcnn_lightning.errors import InputError

MEMORY_LIMIT = 2**31
"""Largest size of the decoded images, in bytes, that :class:`ImageFolder` holds in memory by default."""

_SPLITS: tuple[Split, ...] = ("train", "val", "test")


class ImageFolder(ImageDataModule):
    """Custom images in ``root/train/<class>/…`` and, optionally, ``root/val`` and ``root/test`` with the same layout.

    Small datasets are decoded once and held in memory; large ones, such as ImageNet, are read from disk by
    ``num_workers`` processes. Without ``val``, part of ``train`` is held out for validation; ``test`` is never used
    for model selection. Images are converted to RGB and normalized with the mean and standard deviation of ImageNet.

    Args:
        root: folder of the dataset.
        image_size: height and width of the images, in pixels. None keeps the original size, which all images must
            share, for images in memory and takes 224 for images on disk.
        in_memory: hold the images in memory (true) or read them from disk (false). None holds them in memory if they
            take at most 2 GiB and have the same size or ``image_size`` is set.
        predict_dir: folder of the images to predict, at any depth; None takes ``root/test``.
        crop_padding: black pixels added on each side of training images held in memory, before a random crop to the
            original size; images on disk are cropped at random and resized instead.
        flip: flip training images horizontally with probability 0.5.
        kwargs: see :class:`~pcnn_lightning.data.base.ImageDataModule`.

    Raises:
        ValueError: if an argument is of the wrong type or out of range.
        InputError: if the folder has a different layout, or its splits have different classes.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    side = 224  # for images read from disk

    def __init__(
        self,
        root: str = "data",
        image_size: int | None = None,
        in_memory: bool | None = None,
        predict_dir: str | None = None,
        crop_padding: int = 4,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, crop_padding=crop_padding, flip=flip, **kwargs)
        check_path("root", root)
        if in_memory is not None:
            check_bool("in_memory", in_memory)
        if predict_dir is not None:
            check_path("predict_dir", predict_dir)
        self.root = Path(root).expanduser()
        self.in_memory = in_memory
        self.predict_dir = None if predict_dir is None else Path(predict_dir).expanduser()
        self.classes = _agreed_classes(self.root)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        width, height = self._memory_size or (self.image_size or self.side,) * 2
        return self.in_channels, height, width

    def load(self, split: Split) -> ImageSet | None:
        return self._images(*self._files[split]) if split in self._files else None

    @cached_property
    def predict_set(self) -> ImageSet:
        return self.test_set.unlabelled() if self.predict_dir is None else self._images(self._predict_files)

    def predict_names(self) -> list[str]:
        """Return the paths of the samples of ``predict_set`` relative to ``predict_dir`` or ``root/test``, in order."""
        if self.predict_dir is not None:
            return _below(self.predict_dir, self._predict_files)
        return _below(self.root / "test", self._files["test"][0]) if "test" in self._files else []

    @cached_property
    def _predict_files(self) -> list[str]:
        assert self.predict_dir is not None
        return image_files(self.predict_dir)

    @cached_property
    def _files(self) -> dict[Split, tuple[list[str], Tensor]]:
        """Files and labels of each existing split."""
        found: dict[Split, tuple[list[str], Tensor]] = {}
        for split in _existing_splits(self.root):
            by_class = [image_files(self.root / split / name) for name in self.classes]
            counts = torch.tensor([len(files) for files in by_class])
            files = [file for files in by_class for file in files]
            found[split] = files, torch.arange(self.num_classes).repeat_interleave(counts)
        return found

    @cached_property
    def _memory_size(self) -> tuple[int, int] | None:
        """Size (W, H) of images held in memory, or None for images on disk; the same for all splits and stages."""
        files = [file for split_files, _ in self._files.values() for file in split_files]
        if self.in_memory is False:
            return None
        width, height = size = image_size(files[0]) if self.image_size is None else (self.image_size, self.image_size)
        if self.in_memory is None:
            if 3 * width * height * len(files) > MEMORY_LIMIT:
                return None
            if self.image_size is None and any(image_size(file) != size for file in files):
                return None
        return size

    def _images(self, files: Sequence[str], labels: Tensor | None = None) -> ImageSet:
        size = self._memory_size
        if size is None:
            return DiskImages(files=files, labels=labels, size=self.image_size or self.side)
        return MemoryImages(images=decode_all(files, size, fit=self.image_size is not None), labels=labels)


def _existing_splits(root: Path) -> list[Split]:
    return [split for split in _SPLITS if (root / split).is_dir()]


def _agreed_classes(root: Path) -> list[str]:
    """Return the names of the class folders, which must be the same in all splits."""
    splits = _existing_splits(root)
    if not splits:
        raise InputError(f"{root} has no folder train, val or test: expected {root / 'train' / '<class>' / '<image>'}")
    classes = subfolders(root / splits[0])
    if not classes:
        raise InputError(f"{root / splits[0]} has no class folders: expected one folder of images per class")
    for split in splits[1:]:
        others = set(subfolders(root / split))
        missing, extra = sorted(set(classes) - others), sorted(others - set(classes))
        if missing or extra:
            raise InputError(
                f"{root / split} and {root / splits[0]} must have the same class folders: "
                f"missing {', '.join(missing) or 'none'}; extra {', '.join(extra) or 'none'}"
            )
    return classes


def _below(folder: Path, files: Sequence[str]) -> list[str]:
    return [Path(file).relative_to(folder).as_posix() for file in files]
