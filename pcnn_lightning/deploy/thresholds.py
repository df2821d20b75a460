"""Batch norm and sign in one: exact thresholds, for runtimes that compare instead of multiplying and adding."""

import torch
from torch import Tensor

from pcnn_lightning.layers import FrozenBatchNorm2d

_INFINITY = 0x7F800000  # the bits of float32 infinity


@torch.no_grad()
def sign_thresholds(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """The threshold of each channel at which the sign of a batch norm changes.

    ``norm(x) >= 0`` is ``(x >= threshold) != falls`` for every float32 ``x`` for which ``norm(x)`` is not NaN. Whatever
    way torch rounds, it preserves the order of numbers: bisection over all floats, with torch's own operation, finds
    the threshold.

    Args:
        norm: a batch norm in float32 on the CPU.

    Returns:
        The thresholds, (num_features,) float32, and whether the sign falls from + to - there, (num_features,) bool. A
        channel whose sign never changes has a threshold of -∞ or ∞, or the largest finite number of either sign.
    """
    falls = norm.scale < 0
    low, high = (torch.full_like(falls, end, dtype=torch.int64) for end in (-_INFINITY, _INFINITY))
    for _ in range(33):  # halves 2**32 places down to one
        middle = (low + high).div(2, rounding_mode="floor")
        reached = (norm(_float_at(middle)[:, None, None])[:, 0, 0] >= 0) != falls
        low, high = torch.where(reached, low, torch.minimum(middle + 1, high)), torch.where(reached, middle, high)
    return _float_at(high), falls


def _float_at(place: Tensor) -> Tensor:
    """The float at each place in the order of all floats, in which 0 is at place 0 and infinity at 0x7F800000."""
    return place.abs().to(torch.int32).view(torch.float32) * place.sign()
