"""Batch norm for inference."""

import torch
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """A batch norm folded into ``x * scale + shift``, with the same bits as torch's own on a CPU.

    Where the processor fuses the two operations, their sign is that of the exact ``x * scale + shift``.

    Args:
        num_features: number of channels.

    Attributes:
        scale: (num_features,), γ / √(variance + ε), with the sign of γ.
        shift: (num_features,), β - mean · scale.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_buffer("scale", torch.ones(num_features))
        self.register_buffer("shift", torch.zeros(num_features))

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.BatchNorm2d) -> "FrozenBatchNorm2d":
        """Freeze ``norm``.

        Raises:
            ValueError: if it has no running statistics.
        """
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            raise ValueError("a batch norm to freeze must have running statistics, but has track_running_stats=False")
        frozen = cls(norm.num_features)
        # The operations of torch's CPU kernel, which folds the four numbers in every forward pass.
        scale = (variance + norm.eps).rsqrt()
        frozen.scale = scale if norm.weight is None else scale * norm.weight
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias
        frozen.shift = torch.addcmul(bias, mean, frozen.scale, value=-1)
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, num_features, H, W)."""
        return torch.addcmul(self.shift[:, None, None], x, self.scale[:, None, None])

    def extra_repr(self) -> str:
        return f"{self.num_features}"
