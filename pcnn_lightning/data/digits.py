"""The digits dataset of scikit-learn, which trains in seconds and needs no download."""

from typing import Any

import torch
from sklearn.datasets import load_digits

from pcnn_lightning.data.augment import resize
from pcnn_lightning.data.base import ImageDataModule, Split
from pcnn_lightning.data.datasets import MemoryImages
from pcnn_lightning.data.sampling import Stream, generator, stratified_order

_TEST_SIZE = 360  # one fifth of 1,797


class Digits(ImageDataModule):
    """1,797 gray images of handwritten digits, 8×8 pixels (UCI ML repository, Alpaydin and Kaynak, 1998).

    The test set has 360 images and does not depend on the seed, so that a network trained with one seed can be tested
    with another.

    Args:
        crop_padding: black pixels added on each side of training images, before a random crop to the original size.
        flip: flip training images horizontally with probability 0.5.
        image_size: height and width to which images are resized, in pixels; None keeps 8×8.
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
