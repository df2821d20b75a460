"""Losses that have a state of their own."""

import math

import torch
from torch import Tensor, nn


class CenterLoss(nn.Module):
    r"""Pull each feature towards the centre of its class (3.60; Wen et al., ECCV 2016).

    .. math::
        L_C = \frac{\gamma}{2} \sum_i \lVert x_i - c_{y_i} \rVert^2,
        \qquad
        c_j \leftarrow c_j - \alpha\,\frac{\sum_i [y_i = j](c_j - x_i)}{1 + n_j}

    The sum runs over the batch, so γ is to be chosen with the batch size. Centres start at zero and are no
    parameters: call :meth:`step` where you step the optimizer. A class that had no sample since the last step
    (n_j = 0) keeps its centre. In evaluation mode nothing is gathered.

    Args:
        num_classes: number of classes.
        feature_dim: length of a feature vector.
        weight: γ.
        alpha: α, the share of the way that a centre moves.

    Attributes:
        centers: c, (num_classes, feature_dim), a buffer.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    centers: Tensor

    def __init__(self, num_classes: int, feature_dim: int, weight: float, alpha: float = 0.5) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("feature_dim", feature_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, but got {size}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be a number of at least 0, but got {weight}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], but got {alpha}")
        self.weight, self.alpha = weight, alpha
        self.register_buffer("centers", torch.zeros(num_classes, feature_dim))
        # Since the last step: the sum of each class's features and its count, side by side. Not a buffer, because
        # DDP overwrites buffers with the first process's.
        self.gathered: Tensor | None = None

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of ``features`` (B, feature_dim) with ``labels`` (B,): a scalar, at least float32."""
        features = features.to(torch.promote_types(features.dtype, self.centers.dtype))
        if self.training:
            self._gather(features.detach(), labels)
        return 0.5 * self.weight * (features - self.centers[labels]).square().sum()

    @torch.no_grad()
    def step(self) -> None:
        """Move the centres by what was gathered since the last step, on all processes together."""
        if self.gathered is None:
            return
        gathered, self.gathered = self.gathered, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gathered)
        sums, counts = gathered[:, :-1], gathered[:, -1:]
        self.centers -= self.alpha * (counts * self.centers - sums) / (1 + counts)

    def _gather(self, features: Tensor, labels: Tensor) -> None:
        if self.gathered is None:
            classes, dim = self.centers.shape
            self.gathered = self.centers.new_zeros(classes, dim + 1)
        ones = features.new_ones(len(features), 1)
        self.gathered.index_add_(0, labels, torch.cat([features, ones], dim=1).to(self.gathered.dtype))

    def extra_repr(self) -> str:
        classes, dim = self.centers.shape
        return f"{classes}, {dim}, weight={self.weight}, alpha={self.alpha}"
