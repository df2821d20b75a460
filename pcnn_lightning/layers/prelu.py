"""PReLU with two learned slopes."""

import torch
from torch import Tensor, nn

from pcnn_lightning.checks import check_integer


class TwoSlopePReLU(nn.Module):
    """PReLU whose slopes are both learned for each channel: a·x for x > 0, and b·x otherwise.

    It is the nonlinearity, Maxout, of AdaBin (Tu et al., ECCV 2022, https://arxiv.org/abs/2208.08084). With its initial
    slopes it is the same function as :class:`torch.nn.PReLU`.

    Args:
        channels: number of channels.

    Attributes:
        positive: a, (channels,), at first 1.
        negative: b, (channels,), at first 0.25.

    Raises:
        ValueError: if ``channels`` is no positive integer.

    Example:
        >>> layer = TwoSlopePReLU(2)
        >>> _ = layer.positive.data.fill_(3)
        >>> layer(torch.tensor([2.0, -4.0]).reshape(1, 2, 1, 1)).flatten().tolist()
        [6.0, -1.0]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_integer("channels", channels, 1)
        self.positive = nn.Parameter(torch.ones(channels))
        self.negative = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W), in its dtype."""
        slopes = torch.where(x > 0, self.positive[:, None, None], self.negative[:, None, None])
        return x * slopes.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.positive)}"
