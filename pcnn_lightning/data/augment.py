"""Batched image transforms that run on the device of the images and depend on torch alone.

They draw no random numbers and never synchronize with the device: no ``.item()``, no boolean masks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Pad images with black, crop each to its original size and flip some of them horizontally.

    Args:
        images: (B, C, H, W) of any dtype, such as uint8.
        offsets: (B, 2) int64, the top row and left column of the crop in the padded image, each from 0 to
            ``2 * padding``; an offset of ``padding`` does not shift the image.
        flips: (B,) bool, true for the images to flip.
        padding: number of pixels added on each side.

    Returns:
        (B, C, H, W) of the same dtype.
    """
    channels, height, width = images.shape[1:]
    padded = F.pad(images, (padding, padding, padding, padding))
    rows = torch.arange(height, device=images.device) + offsets[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]  # (B, W)
    # A single gather over flattened pixels, with one index for all channels, is three times as fast on a CPU as
    # indexing with four broadcast tensors.
    window = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1)
    return padded.flatten(2).gather(2, window[:, None].expand(-1, channels, -1)).view(images.shape)


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Flip some of the images, (B, C, H, W), horizontally: those where ``flips``, (B,) bool, is true."""
    return torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set a box of each image to zero, the mean of normalized images (Zhong et al., AAAI 2020).

    Args:
        images: (B, C, H, W) floating point.
        boxes: (B, 4) int64, the first row and column of each box and those after its last; an empty box erases nothing.

    Returns:
        (B, C, H, W) of the same dtype.
    """
    return images.masked_fill(_inside(boxes, images), 0.0)


def mix(images: Tensor, labels: Tensor, shares: Tensor, boxes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    r"""Mix each image with a partner from its batch.

    .. math::
        \tilde x_i = m_i \odot x_i + (1 - m_i) \odot x_{p(i)},
        \qquad
        \tilde y_i = \bar m_i y_i + (1 - \bar m_i) y_{p(i)}

    The mask m_i is λ_i outside of a box and 0 inside, and its mean over the pixels is the share of the image's own
    label. Mixup (Zhang et al., ICLR 2018) has an empty box, cutmix (Yun et al., ICCV 2019) a λ of 1. The partner is
    half a batch away: if a batch is dealt out to processes one sample at a time, an even number to each, the partners
    are the same as in one process.

    Args:
        images: (B, C, H, W) floating point.
        labels: (B,) int64.
        shares: (B,) float32, λ.
        boxes: (B, 4) int64, the first row and column of each box and those after its last.
        num_classes: number of classes, K.

    Returns:
        The mixed images, (B, C, H, W), and the probabilities of their labels, (B, K).
    """
    half, shares = len(images) // 2, shares.to(images.dtype)
    height, width = images.shape[-2:]
    mask = torch.where(_inside(boxes, images), 0.0, shares.view(-1, 1, 1, 1))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    mean = (shares * (1 - areas.to(shares.dtype) / (height * width)))[:, None]
    hot = (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(images.dtype)
    return torch.lerp(images.roll(half, 0), images, mask), torch.lerp(hot.roll(half, 0), hot, mean)


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """Which pixels of each image are inside its box: (B, 1, H, W) bool."""
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Convert raw pixels to float32 with a mean of about zero and a variance of about one.

    Args:
        images: (B, C, H, W) uint8.
        mean: (C, 1, 1) float32, on the scale of raw pixels, 0 to 255.
        std: (C, 1, 1) float32, on the same scale.

    Returns:
        (B, C, H, W) float32, also under autocast.
    """
    return images.to(torch.float32).sub_(mean).div_(std)


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize images to ``size`` × ``size`` pixels by bilinear interpolation with antialiasing.

    Args:
        images: (N, C, H, W) uint8.
        size: height and width in pixels; None returns the images unchanged.

    Returns:
        (N, C, size, size) uint8.
    """
    if size is None or images.shape[-2:] == (size, size):
        return images
    # In chunks, to save memory: torch makes a channels-last copy of its input.
    pieces = [
        F.interpolate(piece, (size, size), mode="bilinear", antialias=True) for piece in torch.split(images, 1024)
    ]
    return torch.cat(pieces)
