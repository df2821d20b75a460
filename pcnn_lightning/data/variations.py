"""Random boxes and shares of random erasing, mixup and cutmix, with the distributions of torchvision's v2 transforms.

torchvision's own transforms draw from the global generator: ``MixUp`` and ``CutMix`` one share for a whole batch, and
pair each image with the one before it, which is another one on another number of processes; ``RandomErasing`` one box
for a whole batch. Here, each image has draws of its own, made on the CPU, so that the device is never waited for.
"""

import math

import numpy as np
import torch
from torch import Tensor

ERASED_AREA, ERASED_RATIO, TRIES = (0.02, 0.33), (0.3, 3.3), 10
"""Share of the area and height / width of erased boxes, and how often one that does not fit is drawn again."""


def draw_erased(rng: np.random.Generator, count: int, sides: tuple[int, int], probability: float) -> Tensor:
    """Draw the boxes of random erasing, those of most images empty unless ``probability`` is large.

    Args:
        rng: random number generator.
        count: number of images, n.
        sides: height and width of the images.
        probability: of erasing a box of an image.

    Returns:
        (n, 4) int64: first row and column, and those after the last.
    """
    boxes = np.zeros((count, 4), np.int64)
    left = np.flatnonzero(rng.random(count) < probability)
    for _ in range(TRIES):
        area = rng.uniform(*ERASED_AREA, len(left)) * math.prod(sides)
        ratio = np.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1]), len(left)))
        size = np.sqrt([area * ratio, area / ratio]).round().astype(np.int64).T
        fits = (size < sides).all(1)
        corner = rng.integers(0, sides - size[fits] + 1)
        boxes[left[fits]] = np.hstack([corner, corner + size[fits]])
        left = left[~fits]
    return torch.from_numpy(boxes)


def draw_mixing(
    rng: np.random.Generator, count: int, sides: tuple[int, int], mixup_alpha: float, cutmix_alpha: float
) -> tuple[Tensor, Tensor]:
    """Draw what :func:`~pcnn_lightning.data.augment.mix` does to each image.

    Args:
        rng: random number generator.
        count: number of images, n.
        sides: height and width of the images.
        mixup_alpha: λ of mixup is of Beta(α, α); 0 for cutmix only.
        cutmix_alpha: likewise, and λ is the share of the image that is kept, but for what the border cuts off the box;
            0 for mixup only.

    Returns:
        λ, (n,) float32, 1 where cutmix is drawn; and boxes, (n, 4) int64, empty where mixup is drawn.
    """
    cuts = rng.random(count) < (cutmix_alpha > 0) / (1 + (mixup_alpha > 0))
    shares = rng.beta(*2 * [np.where(cuts, cutmix_alpha, mixup_alpha)])
    center = rng.integers(0, sides, (count, 2))
    half = (0.5 * np.sqrt(1 - shares)[:, None] * sides).astype(np.int64)
    boxes = np.hstack([np.maximum(center - half, 0), np.minimum(center + half, sides)])
    boxes[~cuts] = 0
    return torch.from_numpy(np.where(cuts, 1, shares).astype(np.float32)), torch.from_numpy(boxes)
