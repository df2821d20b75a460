"""Sets of images too large for memory, decoded when they are asked for."""

from collections.abc import Callable, Sequence
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
    """Image files of any size, brought to ``size`` × ``size`` pixels in the way that is usual for ImageNet.

    For training, a part of 8 to 100 % of the area and of a side ratio of 3:4 to 4:3 is cut out at random, resized and
    perhaps mirrored. Otherwise the shorter side is resized to ``size * 256 / 224`` and the middle is cut out.

    Args:
        files: N paths.
        size: side of the images handed out, in pixels.
        labels: (N,) int64, or None.
        augmentation: for training; None evaluates.
    """

    files: Sequence[str]  # strings: millions of Path objects would be several times as large
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, codes: list[int]) -> RawBatch:
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
        # torchvision draws from the global generator, which is lent to it with a seed of the sample's own. Not by
        # torch.manual_seed: that would seed the GPUs too, which fork_rng leaves alone here.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.augmentation.seed, epoch, Stream.AUGMENTATION, index))
            return to_array(transform(image))
