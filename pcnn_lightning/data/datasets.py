"""Sets of images that hand out whole batches of raw bytes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pcnn_lightning.data.sampling import Stream, generator


class RawBatch(NamedTuple):
    """What travels to the device, to be cropped, mirrored and normalised there: a quarter of the bytes of float32.

    Args:
        images: (B, C, H, W) uint8.
        labels: (B,) int64; None when predicting.
        offsets: (B, 2) int64, as :func:`~pcnn_lightning.data.augment.crop_and_flip` takes them; None leaves the
            images as they are.
        flips: (B,) bool; None exactly where ``offsets`` is.
    """

    images: Tensor
    labels: Tensor | None = None
    offsets: Tensor | None = None
    flips: Tensor | None = None


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    Args:
        seed: of the randomness, together with epoch and sample.
        crop_padding: pixels of black around an image held in memory, before a window of its size is cut out.
        flip: mirror half of the images left to right.
    """

    seed: int
    crop_padding: int
    flip: bool


@dataclass(eq=False, kw_only=True)
class ImageSet(Dataset[RawBatch], ABC):
    """Images with their labels.

    Samples are asked for by *codes*, ``epoch * len(self) + index`` (see
    :class:`~pcnn_lightning.data.sampling.EpochSampler`). Where nothing is random, an index will do.

    Args:
        labels: (N,) int64, or None.
        augmentation: for training; None hands out the images as they are.
    """

    labels: Tensor | None = None
    augmentation: Augmentation | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, N."""

    @abstractmethod
    def __getitems__(self, codes: list[int]) -> RawBatch:
        """The batch that ``codes`` ask for, in their order. torch's DataLoader looks for this method."""

    @abstractmethod
    def select(self, indices: Tensor) -> "ImageSet":
        """The images at ``indices`` (n,) int64, in that order, sharing memory with this set."""

    def augmented(self, augmentation: Augmentation) -> "ImageSet":
        """The same images, varied."""
        return replace(self, augmentation=augmentation)

    def unaugmented(self) -> "ImageSet":
        """The same images as they are."""
        return replace(self, augmentation=None)

    def unlabelled(self) -> "ImageSet":
        """The same images without their labels."""
        return replace(self, labels=None)

    def _labels_at(self, indices: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[indices]


@dataclass(eq=False, kw_only=True)
class MemoryImages(ImageSet):
    """Images of one size held in one tensor: a batch is an indexing operation, with no Python run per sample.

    Args:
        images: (M, C, H, W) uint8.
        indices: (N,) int64, the images of this set; None: all of them.
        labels: (N,) int64, or None.
        augmentation: for training; None hands out the images as they are.
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
    """Offsets (N, 2) and flips (N,) of all samples in an epoch: a table costs less than a generator per sample."""
    rng = generator(augmentation.seed, epoch, Stream.AUGMENTATION)
    offsets = torch.randint(0, 2 * augmentation.crop_padding + 1, (size, 2), generator=rng)
    flips = torch.rand(size, generator=rng) < (0.5 if augmentation.flip else 0.0)
    return offsets, flips
