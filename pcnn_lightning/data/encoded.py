"""Image files that are decoded once and held in memory, or on demand."""

import math
import os
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
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
from pcnn_lightning.data.layout import some_of
from pcnn_lightning.data.memory import amount, available_memory, check_memory
from pcnn_lightning.data.sources import Source
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole

MEMORY_LIMIT = 2**31
"""Largest size of the decoded images, in bytes, that :class:`EncodedImages` holds in memory by default."""
LEFT_OUT = "corrupt_images.txt"
"""Name of the list of files that cannot be read, in the Trainer's ``default_root_dir``."""


class EncodedImages(ImageDataModule):
    """Base class of data modules whose images are files to be decoded, wherever these come from.

    Small datasets are decoded once and held in memory; large ones are read on demand by ``num_workers`` processes.

    To read from somewhere else, write a subclass that implements :meth:`find_classes` and :meth:`find_files`.

    Args:
        root: folder of the dataset.
        image_size: height and width of the images, in pixels. None keeps the original size, which all images must
            share; images on disk need a size.
        in_memory: hold the images in memory (true) or read them from disk (false). None holds them in memory if all
            splits together take at most 2 GiB. It does not depend on the memory of the machine, because images in
            memory are augmented otherwise than those on disk.
        crop_padding: black pixels added on each side of training images held in memory, before a random crop to the
            original size; images on disk are cropped at random and resized instead.
        flip: flip training images horizontally with probability 0.5.
        grayscale: decode to one channel. None decodes to three, and says so if all images are gray.
        skip_corrupt: leave out files whose content cannot be decoded, and list them in ``corrupt_images.txt`` in the
            Trainer's ``default_root_dir``. For that, images on disk are all decoded once. Files that the system does
            not let be read are never left out.
        num_classes: number of classes, with which the images must agree. It lets ``summary`` do without images.
        classes: names of the classes, by label.
        mean: mean per channel of pixels scaled to [0, 1]; None takes that of ImageNet.
        std: standard deviation per channel, likewise.
        kwargs: see :class:`~pcnn_lightning.data.base.ImageDataModule`.

    Raises:
        ValueError: if an argument is of the wrong type or out of range.
        InputError: if ``num_classes`` is not the number of classes.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int | None = None,
        in_memory: bool | None = None,
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
        self.grayscale = grayscale
        self.skip_corrupt = skip_corrupt
        self._named = classes is not None
        self.classes, place = self.find_classes(num_classes) if classes is None else (list(classes), "classes has")
        if num_classes not in (None, len(self.classes)):
            count = len(self.classes)
            raise InputError(f"num_classes is {num_classes}, but {place} {count}: set --data.num_classes {count}")
        self._left_out: dict[str, list[str]] = {}  # by split
        self._recorded: dict[str, list[str]] = {}  # the same, as checkpoints call them

    @abstractmethod
    def find_classes(self, num_classes: int | None) -> tuple[list[str], str]:
        """Find the names of the classes, if they are not given.

        Returns:
            The names by label, and the place where they were found as the start of a sentence, such as "root has".
        """

    @abstractmethod
    def find_files(self) -> dict[Split, tuple[Source, Tensor]]:
        """Find the files and labels, (N,) int64, of each split that there is.

        Raises:
            InputError: if they are missing or invalid.
        """

    @cached_property
    def files_to_predict(self) -> Source | None:
        """Files to predict instead of the test split, or None."""
        return None

    def folder_to_predict(self) -> Path:
        """The folder to which the names of the files to predict are relative."""
        return self.root

    @property
    def image_shape(self) -> tuple[int, int, int]:
        width, height = self._size
        return self.in_channels, height, width

    def load(self, split: Split) -> ImageSet | None:
        return self._images(split, *self._files[split]) if split in self._files else None

    @cached_property
    def predict_set(self) -> ImageSet:
        files = self.files_to_predict
        return self.test_set.unlabelled() if files is None else self._images("predict", files)

    def predict_names(self) -> list[str]:
        """Return the paths of the samples of ``predict_set`` relative to :meth:`folder_to_predict`, in order."""
        split, files = "predict", self.files_to_predict
        if files is None:
            if "test" not in self._files:
                return []
            split, (files, _) = "test", self._files["test"]
        if self.skip_corrupt and split not in self._left_out:
            self._images(split, files)
        left_out, folder = set(self._left_out.get(split, [])), self.folder_to_predict()
        names = [name for name in map(files.name, range(len(files))) if name not in left_out]
        return [os.path.relpath(name, folder) for name in names]

    def state_dict(self) -> dict[str, Any]:
        """Return the record of the images, with whether memory holds them and which files were left out."""
        left_out = [file for split in ("train", "val") for file in self._recorded.get(split, [])]
        return {**super().state_dict(), "in_memory": self._held, "left_out": left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a run goes on with the same classes, and with the same files left out.

        Raises:
            InputError: if they have changed.
        """
        super().load_state_dict(state_dict)
        before, now = state_dict["left_out"], self.state_dict()["left_out"]
        if self.is_fitting and sorted(before) != sorted(now):
            raise InputError(
                f"of the images of this run, {some_of(before) or 'none'} were corrupt and left out, but now "
                f"{some_of(now) or 'none'}: restore the files as they were, or start a new run with init_from"
            )

    @cached_property
    def _files(self) -> dict[Split, tuple[Source, Tensor]]:
        return self.find_files()

    def check_counts(self, split: str, counts: Tensor, problem: str) -> None:
        """Require an image of each class.

        Args:
            split: name of a split.
            counts: number of its images of each class.
            problem: what is wrong with the folder, such as "holds no images".

        Raises:
            InputError: if there is none of a class.
        """
        if empty := [name for name, count in zip(self.classes, counts.tolist(), strict=True) if count == 0]:
            raise InputError(
                f"{self.root / split} {problem} of {len(empty)} of {len(counts)} classes: {some_of(empty)}"
            )

    @cached_property
    def _deciding(self) -> list[Source]:
        """The files that decide on the size of images and where to hold them: those of all splits, if there are any."""
        try:
            return [files for files, _ in self._files.values()]
        except InputError:
            if self._named and self.files_to_predict is not None:
                return [self.files_to_predict]  # of a network that was trained elsewhere
            raise

    @cached_property
    def _size(self) -> tuple[int, int]:
        """(W, H) to which all images are brought; the same for all splits and stages."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        count = sum(map(len, self._deciding))
        sizes, _ = look_at(self._deciding)
        if not sizes:
            raise self._refusal(_failures_of(self._deciding))
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
        return self._bytes(sum(map(len, self._deciding))) <= MEMORY_LIMIT if self.in_memory is None else self.in_memory

    def _bytes(self, count: int) -> int:
        return self.in_channels * self._size[0] * self._size[1] * count

    def _images(self, split: str, files: Source, labels: Tensor | None = None) -> ImageSet:
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
            others = [] if labels is None else [source for source in self._deciding if source is not files]
            raise self._refusal({**_named(failures, files), **_failures_of(others)})
        if not self.skip_corrupt:
            return images
        kept = self._kept(split, files, labels, failures)
        return images.select(kept) if len(kept) < len(files) else images

    def _announce(self, split: str, files: Source, place: str) -> None:
        """Say what is done with images before it is done."""
        sizes, gray = look_at([files])
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

    def _kept(self, split: str, files: Source, labels: Tensor | None, failures: dict[int, Exception]) -> Tensor:
        """Indices of the files that can be read; the same in all processes.

        Raises:
            InputError: if they are not the same, a class has none, or a file fails for another reason than its content.
        """
        by_name = _named(failures, files)
        if others := {file: error for file, error in by_name.items() if not is_corrupt(error)}:
            raise self._refusal(others)
        left_out = self._left_out[split] = list(by_name)
        self._recorded[split] = [files.identity(index, self.root) for index in failures]
        if self.trainer and self.trainer.world_size > 1:
            of_first = self.trainer.strategy.broadcast(left_out)
            if odd := sorted(set(of_first) ^ set(left_out)):
                raise InputError(f"one process can read what another cannot: {some_of(odd)}")
        kept = torch.tensor([index for index in range(len(files)) if index not in failures], dtype=torch.long)
        if labels is not None:
            before, left = (those.bincount(minlength=self.num_classes) for those in (labels, labels[kept]))
            self.check_counts(split, torch.where(before > 0, left, 1), "holds only corrupt images")
        elif len(kept) == 0:
            raise self._refusal(by_name)
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


def _named(failures: Mapping[int, Exception], files: Source) -> dict[str, Exception]:
    return {files.name(index): error for index, error in failures.items()}


def _failures_of(sources: Sequence[Source]) -> dict[str, Exception]:
    return {name: error for files in sources for name, error in _named(failing(files), files).items()}


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
