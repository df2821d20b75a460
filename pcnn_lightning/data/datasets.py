"""Image datasets that return whole batches of raw uint8 pixels."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pcnn_lightning.data.sampling import Stream, decode, generator, numpy_generator
from pcnn_lightning.data.variations import draw_erased, draw_mixing


class RawBatch(NamedTuple):
    """A batch to be augmented and normalized on the device; uint8 takes a quarter of the bytes of float32.

    Args:
        images: (B, C, H, W) uint8.
        labels: (B,) int64; None when predicting.
        offsets: (B, 2) int64, for :func:`~pcnn_lightning.data.augment.crop_and_flip`; None for no crop.
        flips: (B,) bool, which of them to flip; None for no augmentation.
        erased: (B, 4) int64, for :func:`~pcnn_lightning.data.augment.erase`; None for no erasing.
        shares: (B,) float32, for :func:`~pcnn_lightning.data.augment.mix`; None for no mixing.
        pasted: (B, 4) int64, its boxes; None if and only if ``shares`` is None.
    """

    images: Tensor
    labels: Tensor | None = None
    offsets: Tensor | None = None
    flips: Tensor | None = None
    erased: Tensor | None = None
    shares: Tensor | None = None
    pasted: Tensor | None = None


@dataclass(frozen=True)
class Augmentation:
    """Settings of the training augmentation.

    Args:
        seed: random seed, combined with epoch and sample.
        crop_padding: black pixels added on each side of images held in memory, before a random crop to the original
            size.
        flip: flip images horizontally with probability 0.5.
        random_erasing: probability of erasing a box of an image.
        mixup_alpha: α of Beta(α, α), from which the shares of mixup are drawn; 0 turns it off.
        cutmix_alpha: the same of cutmix. With both on, half of the images are mixed by each.
    """

    seed: int
    crop_padding: int
    flip: bool
    random_erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def draw(self, count: int, sides: tuple[int, int], epoch: int, *place: int) -> tuple[Tensor | None, ...]:
        """Draw ``erased``, ``shares`` and ``pasted`` of a :class:`RawBatch` for ``count`` images.

        Args:
            count: number of images.
            sides: height and width of the images.
            epoch: the epoch, with the seed the key of what is drawn.
            place: rest of the key.
        """
        erased = shares = pasted = None
        if self.random_erasing > 0:
            rng = numpy_generator(self.seed, epoch, Stream.ERASING, *place)
            erased = draw_erased(rng, count, sides, self.random_erasing)
        if self.mixup_alpha > 0 or self.cutmix_alpha > 0:
            rng = numpy_generator(self.seed, epoch, Stream.MIXING, *place)
            shares, pasted = draw_mixing(rng, count, sides, self.mixup_alpha, self.cutmix_alpha)
        return erased, shares, pasted


@dataclass(eq=False, kw_only=True)
class ImageSet(Dataset[RawBatch], ABC):
    """Base class of datasets of images and labels.

    Samples are requested by codes (see :func:`~pcnn_lightning.data.sampling.encode`). Plain indices are those of epoch
    0.

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
    _variations: tuple[Tensor | None, ...] = field(init=False, repr=False)

    def __len__(self) -> int:
        return len(self.images if self.indices is None else self.indices)

    def __getitems__(self, codes: list[int]) -> RawBatch:
        epoch, indices, variations = decode(torch.tensor(codes), len(self))
        images, labels = self.images[self._positions(indices)], self._labels_at(indices)
        if self.augmentation is None:
            return RawBatch(images, labels)
        if epoch != self._epoch:
            # A whole epoch at once, which costs less than one generator per sample.
            crops = _draw_crops(len(self), self.augmentation, epoch)
            sides = (self.images.shape[-2], self.images.shape[-1])
            self._epoch, self._variations = epoch, (*crops, *self.augmentation.draw(len(self), sides, epoch))
        return RawBatch(images, labels, *(one if one is None else one[variations] for one in self._variations))

    def select(self, indices: Tensor) -> "MemoryImages":
        return replace(self, indices=self._positions(indices), labels=self._labels_at(indices))

    def _positions(self, indices: Tensor) -> Tensor:
        return indices if self.indices is None else self.indices[indices]


def _draw_crops(size: int, augmentation: Augmentation, epoch: int) -> tuple[Tensor, Tensor]:
    """Draw offsets (N, 2) and flips (N,)."""
    rng = generator(augmentation.seed, epoch, Stream.AUGMENTATION)
    offsets = torch.randint(0, 2 * augmentation.crop_padding + 1, (size, 2), generator=rng)
    flips = torch.rand(size, generator=rng, dtype=torch.float32) < (0.5 if augmentation.flip else 0.0)
    return offsets, flips
