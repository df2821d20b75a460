"""Datasets too large for memory, decoded on demand."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import center_crop, resize

from pcnn_lightning.data.datasets import Augmentation, ImageSet, RawBatch
from pcnn_lightning.data.decode import decode, fitted
from pcnn_lightning.data.sampling import Stream, generator
from pcnn_lightning.data.sources import Source

Box = tuple[int, int, int, int]
"""Top row, left column, height and width, in pixels."""

_ASPECT = 4 / 3
"""Largest aspect ratio of a random box; the smallest is its inverse."""
_LOG_ASPECTS: list[float] = torch.tensor([1 / _ASPECT, _ASPECT], dtype=torch.float32).log().tolist()


@dataclass(eq=False, kw_only=True)
class DiskImages(ImageSet):
    """Image files of any size, brought to one size by the usual ImageNet transforms.

    For training, a random crop with 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3 is resized and, if
    enabled, randomly flipped. For evaluation, the shorter side is resized to ``256 / 224`` of the size before a center
    crop.

    Args:
        files: N files.
        size: (W, H) of the returned images, in pixels; equal unless ``margin`` is false.
        margin: for evaluation, cut off a margin as above; if false, resize and center-crop as little as possible, as
            images in memory are.
        grayscale: decode to one channel instead of three.
        labels: (N,) int64, or None.
        augmentation: augmentation for training; None applies the evaluation transforms.
    """

    files: Source
    size: tuple[int, int]
    margin: bool = True
    grayscale: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, codes: list[int]) -> RawBatch:
        width, height = self.size
        images = torch.empty((len(codes), 1 if self.grayscale else 3, height, width), dtype=torch.uint8)
        flips = torch.zeros(len(codes), dtype=torch.bool)
        for place, code in enumerate(codes):
            images[place], flips[place] = self._image(code)
        labels = self._labels_at(torch.tensor(codes) % len(self))
        if self.augmentation is None:
            return RawBatch(images, labels)
        return RawBatch(images, labels, None, flips, *self._variations(codes, self.augmentation))

    def select(self, indices: Tensor) -> "DiskImages":
        return replace(self, files=self.files.select(indices), labels=self._labels_at(indices))

    def _variations(self, codes: list[int], augmentation: Augmentation) -> Iterator[Tensor | None]:
        drawn = [augmentation.draw(1, self.size[::-1], *divmod(code, len(self))) for code in codes]
        return (None if parts[0] is None else torch.cat(parts) for parts in zip(*drawn, strict=True))

    def _image(self, code: int) -> tuple[Tensor, bool]:
        """An image, and whether it is to be flipped."""
        epoch, index = divmod(code, len(self))
        image = decode(self.files, index, self.grayscale)
        if self.augmentation is not None:
            rng = generator(self.augmentation.seed, epoch, Stream.AUGMENTATION, index)
            image = _resized(_cut(image, random_box(image.shape[1], image.shape[2], rng)), self.size[0])
            chance = 0.5 if self.augmentation.flip else 0.0
            return image, bool(torch.rand(1, generator=rng, dtype=torch.float32) < chance)
        return _middle(image, self.size[0]) if self.margin else fitted(image, self.size), False


def random_box(height: int, width: int, rng: torch.Generator) -> Box:
    """Draw a box of 8 to 100 % of the area of an image and an aspect ratio of 3:4 to 4:3.

    These are the numbers that torchvision's ``RandomResizedCrop`` draws, from a generator of one's own.
    """
    for _ in range(10):
        area = height * width * _uniform(0.08, 1.0, rng=rng).item()
        aspect = _uniform(*_LOG_ASPECTS, rng=rng).exp().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=rng))
            return top, int(torch.randint(0, width - w + 1, (1,), generator=rng)), h, w
    # None fits into a long image, of which the middle is taken.
    w = min(width, round(height * _ASPECT))
    h = min(height, round(width * _ASPECT))
    return (height - h) // 2, (width - w) // 2, h, w


def _uniform(low: float, high: float, *, rng: torch.Generator) -> Tensor:
    return torch.empty(1, dtype=torch.float32).uniform_(low, high, generator=rng)


def _cut(image: Tensor, box: Box) -> Tensor:
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def _resized(image: Tensor, side: int) -> Tensor:
    """Resize with antialiasing, three times as fast as Pillow; a hundredth of the pixels differs from its by 1."""
    return interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]


def _middle(image: Tensor, side: int) -> Tensor:
    middle: Tensor = center_crop(resize(image, [round(side * 256 / 224)]), [side])
    return middle
