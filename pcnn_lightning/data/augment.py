"""What is done to images in batches, on whichever device holds them. Only torch is imported here.

Nothing here draws random numbers and nothing waits for the device: no ``.item()``, no boolean mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Pad images with black, cut a window of the former size out of each, then mirror some of them.

    Args:
        images: (B, C, H, W) of any type, such as uint8.
        offsets: (B, 2) int64, the window's top row and left column in the padded image, each from 0 to
            ``2 * padding``; ``padding`` leaves an image where it was.
        flips: (B,) bool, true where the window is mirrored left to right.
        padding: pixels added on each side.

    Returns:
        (B, C, H, W) of the same type.
    """
    channels, height, width = images.shape[1:]
    padded = F.pad(images, (padding, padding, padding, padding))
    rows = torch.arange(height, device=images.device) + offsets[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]  # (B, W)
    # One gather along the flattened plane, whose index all channels share, is three times as fast on a CPU as
    # indexing with four broadcast tensors.
    window = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1)
    return padded.flatten(2).gather(2, window[:, None].expand(-1, channels, -1)).view(images.shape)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn raw pixels into float32 of about zero mean and unit variance.

    Args:
        images: (B, C, H, W) uint8.
        mean: (C, 1, 1) float32 in raw units, 0 to 255.
        std: (C, 1, 1) float32 in raw units.

    Returns:
        (B, C, H, W) float32, whatever autocast makes of it later.
    """
    return images.to(torch.float32).sub_(mean).div_(std)


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize images to ``size`` × ``size`` pixels by antialiased bilinear interpolation.

    Args:
        images: (N, C, H, W) uint8.
        size: the new side in pixels; None keeps the images as they are.

    Returns:
        (N, C, size, size) uint8.
    """
    if size is None or images.shape[-2:] == (size, size):
        return images
    # In pieces, because torch works on a channels-last copy of what it is given.
    pieces = [
        F.interpolate(piece, (size, size), mode="bilinear", antialias=True) for piece in torch.split(images, 1024)
    ]
    return torch.cat(pieces)
