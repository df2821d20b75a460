"""Datasets too large for memory, decoded on demand."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pcnn_lightning.data.datasets import ImageSet, RawBatch
from pcnn_lightning.data.decode import decode, fitted, to_array
from pcnn_lightning.data.sampling import Stream, mixed_seed


@dataclass(eq=False, kw_only=True)
class DiskImages(ImageSet):
    """Image files of any size, brought to one size by the usual ImageNet transforms.

    For training, a random crop with 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3 is resized and, if
    enabled, randomly flipped. For evaluation, the shorter side is resized to ``256 / 224`` of the size before a center
    crop.

    Args:
        files: N paths.
        size: (W, H) of the returned images, in pixels; equal unless ``margin`` is false.
        margin: for evaluation, cut off a margin as above; if false, resize and center-crop as little as possible, as
            images in memory are.
        grayscale: decode to one channel instead of three.
        labels: (N,) int64, or None.
        augmentation: augmentation for training; None applies the evaluation transforms.
    """

    files: Sequence[str]  # strings, because millions of Path objects take several times the memory
    size: tuple[int, int]
    margin: bool = True
    grayscale: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, codes: list[int]) -> RawBatch:
        with _default_dtype(torch.float32):  # torchvision draws in the default dtype
            transform = self._transform()
            images = [torch.tensor(self._image(code, transform)) for code in codes]
        labels = self._labels_at(torch.tensor(codes) % len(self))
        return RawBatch(torch.stack(images), labels, None, None, *self._variations(codes))

    def select(self, indices: Tensor) -> "DiskImages":
        files = [self.files[index] for index in indices.tolist()]
        return replace(self, files=files, labels=self._labels_at(indices))

    def _variations(self, codes: list[int]) -> Iterator[Tensor | None]:
        if self.augmentation is not None:
            keys = (divmod(code, len(self)) for code in codes)
            drawn = [self.augmentation.draw(1, self.size[::-1], *key) for key in keys]
            yield from (None if parts[0] is None else torch.cat(parts) for parts in zip(*drawn, strict=True))

    def _transform(self) -> Callable[[Image.Image], Image.Image]:
        side = self.size[0]
        if self.augmentation is not None:
            chance = 0.5 if self.augmentation.flip else 0.0
            steps: list[Any] = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(chance)]
        elif self.margin:
            steps = [v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]
        else:
            return lambda image: fitted(image, self.size)
        compose: Callable[[Image.Image], Image.Image] = v2.Compose(steps)
        return compose

    def _image(self, code: int, transform: Callable[[Image.Image], Image.Image]) -> Any:
        epoch, index = divmod(code, len(self))
        image = decode(self.files[index], self.grayscale)
        if self.augmentation is None:
            return to_array(transform(image))
        # torchvision draws from the global generator, so seed that per sample and restore it afterwards. Not with
        # torch.manual_seed, which would also seed the GPUs, whose state fork_rng does not restore here.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.augmentation.seed, epoch, Stream.AUGMENTATION, index))
            return to_array(transform(image))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
