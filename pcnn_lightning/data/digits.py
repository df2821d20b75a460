"""The digits that come with scikit-learn: small enough to learn in seconds, and never downloaded."""

from typing import Any

import torch
from sklearn.datasets import load_digits

from pcnn_lightning.data.augment import resize
from pcnn_lightning.data.base import ImageDataModule, Split
from pcnn_lightning.data.datasets import MemoryImages
from pcnn_lightning.data.sampling import Stream, generator, stratified_order

_TEST_SIZE = 360  # a fifth of the 1,797


class Digits(ImageDataModule):
    """1,797 handwritten digits of 8×8 grey pixels (UCI ML repository, Alpaydin and Kaynak, 1998).

    360 images, the same for every seed, are for testing: a network trained under one seed can be tested under
    another.

    Args:
        crop_padding: training images are padded by so many black pixels, then cut back to their size at random.
        flip: mirror half of the training images left to right.
        image_size: resize images to this side, in pixels; None: leave them at 8.
        kwargs: see :class:`~pcnn_lightning.data.base.ImageDataModule`.
    """

    classes = [str(digit) for digit in range(10)]
    mean = (0.3049,)
    std = (0.3185,)
    side = 8

    def __init__(self, crop_padding: int = 1, flip: bool = False, image_size: int | None = 16, **kwargs: Any) -> None:
        super().__init__(crop_padding=crop_padding, flip=flip, image_size=image_size, **kwargs)

    def load(self, split: Split) -> MemoryImages | None:
        if split == "val":
            return None
        digits = load_digits()
        images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target).long()
        order = stratified_order(labels, generator(0, Stream.SPLIT))
        chosen = order[:_TEST_SIZE] if split == "test" else order[_TEST_SIZE:]
        return MemoryImages(images=resize(images[chosen], self.image_size), labels=labels[chosen])
