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
