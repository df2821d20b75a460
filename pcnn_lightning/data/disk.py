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
from pcnn_lightning.data.decode import decode, to_array
from pcnn_lightning.data.sampling import Stream, mixed_seed


@dataclass(eq=False, kw_only=True)
class DiskImages(ImageSet):
    """Image files of any size, resized to ``size`` × ``size`` pixels by the usual ImageNet transforms.

    For training, a random crop with 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3 is resized and, if
    enabled, randomly flipped. For evaluation, the shorter side is resized to ``size * 256 / 224`` before a center crop.

    Args:
        files: N paths.
        size: height and width of the returned images, in pixels.
        labels: (N,) int64, or None.
        augmentation: augmentation for training; None applies the evaluation transforms.
    """

    files: Sequence[str]  # strings, because millions of Path objects take several times the memory
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, codes: list[int]) -> RawBatch:
        with _default_dtype(torch.float32):  # torchvision draws in the default dtype
            transform = self._transform()
            images = [torch.tensor(self._image(code, transform)) for code in codes]
        return RawBatch(torch.stack(images), self._labels_at(torch.tensor(codes) % len(self)))

    def select(self, indices: Tensor) -> "DiskImages":
        files = [self.files[index] for index in indices.tolist()]
        return replace(self, files=files, labels=self._labels_at(indices))

    def _transform(self) -> Callable[[Image.Image], Image.Image]:
        if self.augmentation is None:
            steps: list[Any] = [v2.Resize(round(self.size * 256 / 224)), v2.CenterCrop(self.size)]
        else:
            chance = 0.5 if self.augmentation.flip else 0.0
            steps = [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip(chance)]
        compose: Callable[[Image.Image], Image.Image] = v2.Compose(steps)
        return compose

    def _image(self, code: int, transform: Callable[[Image.Image], Image.Image]) -> Any:
        epoch, index = divmod(code, len(self))
        image = decode(self.files[index])
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
