"""Image datasets that return whole batches of raw uint8 pixels."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pcnn_lightning.data.sampling import Stream, generator


class RawBatch(NamedTuple):
    """A batch to be cropped, flipped and normalized on the device; uint8 takes a quarter of the bytes of float32.

    Args:
        images: (B, C, H, W) uint8.
        labels: (B,) int64; None when predicting.
        offsets: (B, 2) int64, for :func:`~pcnn_lightning.data.augment.crop_and_flip`; None for no augmentation.
        flips: (B,) bool; None if and only if ``offsets`` is None.
    """

    images: Tensor
    labels: Tensor | None = None
    offsets: Tensor | None = None
    flips: Tensor | None = None


@dataclass(frozen=True)
class Augmentation:
    """Settings of the training augmentation.

    Args:
        seed: random seed, combined with epoch and sample.
        crop_padding: black pixels added on each side of images held in memory, before a random crop to the original
            size.
        flip: flip images horizontally with probability 0.5.
    """

    seed: int
    crop_padding: int
    flip: bool


@dataclass(eq=False, kw_only=True)
class ImageSet(Dataset[RawBatch], ABC):
    """Base class of datasets of images and labels.

    Samples are requested by *codes*, ``epoch * len(self) + index`` (see
    :class:`~pcnn_lightning.data.sampling.EpochSampler`). Without augmentation, plain indices work too.

    Args:
        labels: (N,) int64, or None.
        augmentation: augmentation for training; None returns the images unchanged.
    """

    labels: Tensor | None = None
    augmentation: Augmentation | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, N."""

    @abstractmethod
    def __getitems__(self, codes: list[int]) -> RawBatch:
        """Return the batch for ``codes``, in their order. The DataLoader of torch calls this method if it exists."""

    @abstractmethod
    def select(self, indices: Tensor) -> "ImageSet":
        """Return the subset at ``indices``, (n,) int64, in that order, sharing memory with this dataset."""

    def augmented(self, augmentation: Augmentation) -> "ImageSet":
        """Return the same images with ``augmentation``."""
        return replace(self, augmentation=augmentation)

    def unaugmented(self) -> "ImageSet":
        """Return the same images without augmentation."""
        return replace(self, augmentation=None)

    def unlabelled(self) -> "ImageSet":
        """Return the same images without labels."""
        return replace(self, labels=None)

    def _labels_at(self, indices: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[indices]


@dataclass(eq=False, kw_only=True)
class MemoryImages(ImageSet):
    """Images of equal size, held in one tensor: a batch takes one indexing operation, without Python code per sample.

    Args:
        images: (M, C, H, W) uint8.
        indices: (N,) int64, the images in this dataset; None for all.
        labels: (N,) int64, or None.
        augmentation: augmentation for training; None returns the images unchanged.
    """

    images: Tensor
    indices: Tensor | None = None
    _epoch: int = field(default=-1, init=False, repr=False)
    _variations: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __len__(self) -> int:
        return len(self.images if self.indices is None else self.indices)

    def __getitems__(self, codes: list[int]) -> RawBatch:
        epoch = codes[0] // len(self)
        indices = torch.tensor(codes) % len(self)
        images, labels = self.images[self._positions(indices)], self._labels_at(indices)
        if self.augmentation is None:
            return RawBatch(images, labels)
        if epoch != self._epoch:
            self._epoch, self._variations = epoch, _draw_variations(len(self), self.augmentation, epoch)
        offsets, flips = self._variations
        return RawBatch(images, labels, offsets[indices], flips[indices])

    def select(self, indices: Tensor) -> "MemoryImages":
        return replace(self, indices=self._positions(indices), labels=self._labels_at(indices))

    def _positions(self, indices: Tensor) -> Tensor:
        return indices if self.indices is None else self.indices[indices]


def _draw_variations(size: int, augmentation: Augmentation, epoch: int) -> tuple[Tensor, Tensor]:
    """Draw offsets (N, 2) and flips (N,) for a whole epoch, which costs less than one generator per sample."""
    rng = generator(augmentation.seed, epoch, Stream.AUGMENTATION)
    offsets = torch.randint(0, 2 * augmentation.crop_padding + 1, (size, 2), generator=rng)
    flips = torch.rand(size, generator=rng, dtype=torch.float32) < (0.5 if augmentation.flip else 0.0)
    return offsets, flips
