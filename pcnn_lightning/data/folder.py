"""Image folders with one subfolder per class."""

import math
import os
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from pcnn_lightning.checks import check_bool, check_integer, check_path, is_number
from pcnn_lightning.data.base import ImageDataModule, Split
from pcnn_lightning.data.datasets import ImageSet, MemoryImages
from pcnn_lightning.data.decode import LOOKED_AT, decode_all, failing, is_corrupt, look_at, unreadable
from pcnn_lightning.data.disk import DiskImages
from pcnn_lightning.data.layout import EXTENSIONS, agreed_classes, existing_splits, image_files, some_of
from pcnn_lightning.data.memory import amount, available_memory, check_memory
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole

MEMORY_LIMIT = 2**31
"""Largest size of the decoded images, in bytes, that :class:`ImageFolder` holds in memory by default."""
LEFT_OUT = "corrupt_images.txt"
"""Name of the list of files that cannot be read, in the Trainer's ``default_root_dir``."""


class ImageFolder(ImageDataModule):
    """Custom images in ``root/train/<class>/…`` and, optionally, ``root/val`` and ``root/test`` with the same layout.

    Small datasets are decoded once and held in memory; large ones, such as ImageNet, are read from disk by
    ``num_workers`` processes. Without ``val``, part of ``train`` is held out for validation; ``test`` is never used
    for model selection.

    Without ``root``, images of ``predict_dir`` can be predicted, if ``classes`` or ``num_classes`` is given. The
    command line takes these, ``image_size``, ``in_memory``, ``grayscale``, ``mean`` and ``std`` from the packed file or
    checkpoint that ``--ckpt_path`` names, unless they are given.

    Args:
        root: folder of the dataset.
        image_size: height and width of the images, in pixels. None keeps the original size, which all images must
            share; images on disk need a size.
        in_memory: hold the images in memory (true) or read them from disk (false). None holds them in memory if all
            splits together take at most 2 GiB. It does not depend on the memory of the machine, because images in
            memory are augmented otherwise than those on disk.
        predict_dir: folder of the images to predict, at any depth; None takes ``root/test``.
        crop_padding: black pixels added on each side of training images held in memory, before a random crop to the
            original size; images on disk are cropped at random and resized instead.
        flip: flip training images horizontally with probability 0.5.
        grayscale: decode to one channel. None decodes to three, and says so if all images are gray.
        skip_corrupt: leave out files whose content cannot be decoded, and list them in ``corrupt_images.txt`` in the
            Trainer's ``default_root_dir``. For that, images on disk are all decoded once. Files that the system does
            not let be read are never left out.
        num_classes: number of classes, with which the folders must agree. It lets ``summary`` do without images.
        classes: names of the classes and their folders, by label; None takes the folders' names in sorted order.
        mean: mean per channel of pixels scaled to [0, 1]; None takes that of ImageNet.
        std: standard deviation per channel, likewise.
        kwargs: see :class:`~pcnn_lightning.data.base.ImageDataModule`.

    Raises:
        ValueError: if an argument is of the wrong type or out of range.
        InputError: if the folder has a different layout, or its splits have different classes.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int | None = None,
        in_memory: bool | None = None,
        predict_dir: str | None = None,
        crop_padding: int = 4,
        flip: bool = True,
        grayscale: bool | None = None,
        skip_corrupt: bool = False,
        num_classes: int | None = None,
        classes: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        check_path("root", root)
        if predict_dir is not None:
            check_path("predict_dir", predict_dir)
        for name, value in {"in_memory": in_memory, "grayscale": grayscale}.items():
            if value is not None:
                check_bool(name, value)
        check_bool("skip_corrupt", skip_corrupt)
        if num_classes is not None:
            check_integer("num_classes", num_classes, 1)
        if classes is not None:
            _check_names("classes", classes)
        self.mean = _per_channel("mean", mean, 0, (0.449,) if grayscale else (0.485, 0.456, 0.406))
        self.std = _per_channel("std", std, 1e-6, (0.226,) if grayscale else (0.229, 0.224, 0.225))
        super().__init__(image_size=image_size, crop_padding=crop_padding, flip=flip, **kwargs)
        self.root = Path(root).expanduser()
        self.in_memory = in_memory
        self.predict_dir = None if predict_dir is None else Path(predict_dir).expanduser()
        self.grayscale = grayscale
        self.skip_corrupt = skip_corrupt
        self._named = classes is not None
        if classes is not None:
            self.classes = list(classes)
        elif num_classes is None or existing_splits(self.root):
            self.classes = agreed_classes(self.root)
        else:
            self.classes = [str(label) for label in range(num_classes)]
        if num_classes not in (None, len(self.classes)):
            held = "classes has" if self._named else f"{self.root} has class folders for"
            count = len(self.classes)
            raise InputError(f"num_classes is {num_classes}, but {held} {count}: set --data.num_classes {count}")
        self._left_out: dict[str, list[str]] = {}  # by split

    @property
    def image_shape(self) -> tuple[int, int, int]:
        width, height = self._size
        return self.in_channels, height, width

    def load(self, split: Split) -> ImageSet | None:
        return self._images(split, *self._files[split]) if split in self._files else None

    @cached_property
    def predict_set(self) -> ImageSet:
        return self.test_set.unlabelled() if self.predict_dir is None else self._images("predict", self._predict_files)

    def predict_names(self) -> list[str]:
        """Return the paths of the samples of ``predict_set`` relative to ``predict_dir`` or ``root/test``, in order."""
        if self.predict_dir is not None:
            split, folder, files = "predict", self.predict_dir, self._predict_files
        elif "test" in self._files:
            split, folder, files = "test", self.root / "test", self._files["test"][0]
        else:
            return []
        if self.skip_corrupt and split not in self._left_out:
            self._images(split, files)
        left_out = set(self._left_out.get(split, []))
        return [Path(file).relative_to(folder).as_posix() for file in files if file not in left_out]

    def state_dict(self) -> dict[str, Any]:
        """Return the record of the images, with whether memory holds them and which files were left out."""
        left_out = [
            os.path.relpath(file, self.root) for split in ("train", "val") for file in self._left_out.get(split, [])
        ]
        return {**super().state_dict(), "in_memory": self._held, "left_out": left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a run goes on with the same classes, and with the same files left out.

        Raises:
            InputError: if they have changed.
        """
        super().load_state_dict(state_dict)
        before, now = state_dict["left_out"], self.state_dict()["left_out"]
        if self.is_fitting and before != now:
            raise InputError(
                f"of the images of this run, {some_of(before) or 'none'} were corrupt and left out, but now "
                f"{some_of(now) or 'none'}: restore the files as they were, or start a new run with init_from"
            )

    @cached_property
    def _predict_files(self) -> list[str]:
        assert self.predict_dir is not None
        return image_files(self.predict_dir)

    @cached_property
    def _files(self) -> dict[Split, tuple[list[str], Tensor]]:
        """Files and labels of each existing split."""
        agreed_classes(self.root, self.classes)
        found: dict[Split, tuple[list[str], Tensor]] = {}
        for split in existing_splits(self.root):
            by_class = [image_files(self.root / split / name, required=False) for name in self.classes]
            counts = torch.tensor([len(files) for files in by_class])
            self._check_counts(split, counts, f"holds no images ({', '.join(EXTENSIONS)})")
            files = [file for files in by_class for file in files]
            found[split] = files, torch.arange(self.num_classes).repeat_interleave(counts)
        return found

    def _check_counts(self, split: str, counts: Tensor, problem: str) -> None:
        """Require an image of each class."""
        if empty := [name for name, count in zip(self.classes, counts.tolist(), strict=True) if count == 0]:
            raise InputError(
                f"{self.root / split} {problem} of {len(empty)} of {len(counts)} classes: {some_of(empty)}"
            )

    @cached_property
    def _deciding(self) -> list[str]:
        """The files that decide on the size of images and where to hold them: those of all splits, if there are any."""
        try:
            return [file for files, _ in self._files.values() for file in files]
        except InputError:
            if self._named and self.predict_dir is not None:
                return self._predict_files  # of a network that was trained elsewhere
            raise

    @cached_property
    def _size(self) -> tuple[int, int]:
        """(W, H) to which all images are brought; the same for all splits and stages."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        count = len(self._deciding)
        sizes, _ = look_at(self._deciding)
        if not sizes:
            raise self._refusal(failing(self._deciding))
        words = _in_words(sizes, count)
        if len(sizes) > 1:
            takes = [f"{amount(self.in_channels * side**2 * count)} at {side}×{side}" for side in (32, 64, 224)]
            raise InputError(
                f"the {count:,} images are {words}: set --data.image_size to resize them. They take {takes[0]}, "
                f"{takes[1]} and {takes[2]}; a training step takes 4 and 49 times as much memory and time at 64×64 "
                "and 224×224 as at 32×32"
            )
        (size,) = sizes
        if self.in_memory is False:
            raise InputError(
                f"images {words} are to be read from disk: set --data.image_size, to which they are resized"
            )
        needed = self.in_channels * size[0] * size[1] * count
        if self.in_memory is None and needed > MEMORY_LIMIT:
            raise InputError(
                f"{count:,} images {words} take {amount(needed)} of memory, more than {amount(MEMORY_LIMIT)}: "
                "set --data.image_size to read them from disk, or --data.in_memory true"
            )
        return size

    @cached_property
    def _held(self) -> bool:
        """Whether memory holds the images of the splits; images to predict are then resized in the same way."""
        return self._bytes(len(self._deciding)) <= MEMORY_LIMIT if self.in_memory is None else self.in_memory

    def _bytes(self, count: int) -> int:
        return self.in_channels * self._size[0] * self._size[1] * count

    def _images(self, split: str, files: Sequence[str], labels: Tensor | None = None) -> ImageSet:
        needed, held, gray = self._bytes(len(files)), self._held, bool(self.grayscale)
        if held and labels is None:  # images to predict are needed once, and are resized in the same way from disk
            available = available_memory()
            held = needed <= MEMORY_LIMIT and (available is None or needed <= available)
        self._announce(split, files, f"held in memory ({amount(needed)})" if held else "read from disk")
        images: ImageSet
        if held:
            self._check_memory(len(files), needed)
            pixels, failures = decode_all(
                files, self._size, fit=self.image_size is not None or labels is None, grayscale=gray
            )
            images = MemoryImages(images=pixels, labels=labels)
        else:
            failures = failing(files) if self.skip_corrupt else {}
            images = DiskImages(files=files, labels=labels, size=self._size, margin=not self._held, grayscale=gray)
        if failures and not self.skip_corrupt:
            if labels is not None:
                looked_at = set(files)
                failures |= failing([file for file in self._deciding if file not in looked_at])
            raise self._refusal(failures)
        if not self.skip_corrupt:
            return images
        kept = self._kept(split, files, labels, failures)
        return images.select(kept) if len(kept) < len(files) else images

    def _announce(self, split: str, files: Sequence[str], place: str) -> None:
        """Say what is done with images before it is done."""
        sizes, gray = look_at(files)
        words = f"{_in_words(sizes, len(files))}, " if sizes else ""
        resized = f"resized to {self._size[0]}×{self._size[1]}, " if list(sizes) != [self._size] else ""
        rank_zero_info(f"{split}: {len(files):,} images {words}{resized}{place}")
        if gray and self.grayscale is None and split == "train":
            rank_zero_info("These images are gray, in three equal channels: --data.grayscale true trains on one")

    def _check_memory(self, count: int, needed: int) -> None:
        processes = self.trainer.num_devices if self.trainer else 1  # of this machine; all of them ask at the same time
        each = f" in {processes} processes" if processes > 1 else ""
        size = f"{self._size[0]}×{self._size[1]}"
        advice = "read them from disk by --data.in_memory false, or set a smaller --data.image_size"
        check_memory(f"{count:,} images of {size} pixels{each}", processes * needed, advice)

    def _refusal(self, failures: dict[str, Exception]) -> InputError:
        listed = self._list(list(failures)) if len(failures) > 10 else ""
        return unreadable(failures, listed, can_be_left_out=not self.skip_corrupt)

    def _kept(self, split: str, files: Sequence[str], labels: Tensor | None, failures: dict[str, Exception]) -> Tensor:
        """Indices of the files that can be read; the same in all processes.

        Raises:
            InputError: if they are not the same, a class has none, or a file fails for another reason than its content.
        """
        if others := {file: error for file, error in failures.items() if not is_corrupt(error)}:
            raise self._refusal(others)
        left_out = self._left_out[split] = list(failures)
        if self.trainer and self.trainer.world_size > 1:
            of_first = self.trainer.strategy.broadcast(left_out)
            if odd := sorted(set(of_first) ^ set(left_out)):
                raise InputError(f"one process can read what another cannot: {some_of(odd)}")
        kept = torch.tensor([index for index, file in enumerate(files) if file not in failures], dtype=torch.long)
        if labels is not None:
            self._check_counts(split, labels[kept].bincount(minlength=self.num_classes), "holds only corrupt images")
        elif len(kept) == 0:
            raise self._refusal(failures)
        if left_out:
            listed = self._list([file for files in self._left_out.values() for file in files])
            counts = f"{len(left_out):,} of {len(files):,} images"
            rank_zero_info(f"{split}: {counts} are corrupt and left out: {some_of(left_out)}{listed}")
        return kept

    def _list(self, files: Sequence[str]) -> str:
        """Write the list of corrupt files, if there is a Trainer, and say where it is."""
        if not self.trainer:
            return ""
        path = Path(self.trainer.default_root_dir) / LEFT_OUT
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            write_whole(path, "".join(f"{file}\n" for file in files).encode(errors="surrogateescape"))
        return f" (all of them: {path})"


def _in_words(sizes: Collection[tuple[int, int]], count: int) -> str:
    small, *_ = ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    if len(ordered) == 1:
        return f"of {small[0]}×{small[1]}"
    large, most = ordered[-1], "at least " if count > LOOKED_AT else ""
    return f"of {most}{len(sizes):,} sizes, from {small[0]}×{small[1]} to {large[0]}×{large[1]}"


def _check_names(name: str, value: Any) -> None:
    """Require a list of different strings."""
    strings = isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value)
    if not strings or not value or len(set(value)) < len(value):
        raise ValueError(f"{name} must be a list of different names, but got {value!r}")


def _per_channel(name: str, value: Any, minimum: float, default: tuple[float, ...]) -> tuple[float, ...]:
    """Return a number for each channel."""
    if value is None:
        return default
    numbers = isinstance(value, (list, tuple)) and all(is_number(item) and minimum <= item < math.inf for item in value)
    if not numbers or len(value) != len(default):
        what = "a list of 1 number" if len(default) == 1 else f"a list of {len(default)} numbers"
        raise ValueError(f"{name} must be {what} of at least {minimum:g}, but got {value!r}")
    return tuple(value)
