"""Center loss."""

import torch
from torch import Tensor

from pcnn_lightning.checks import check_integer, check_number, check_share
from pcnn_lightning.losses.term import LossTerm, Outputs


class CenterLoss(LossTerm):
    r"""Pull each feature vector towards the center of its class (3.60; Wen et al., ECCV 2016).

    .. math::
        L_C = \frac{\gamma}{2} \sum_i \lVert x_i - c_{y_i} \rVert^2,
        \qquad
        c_j \leftarrow c_j - \alpha\,\frac{\sum_i [y_i = j](c_j - x_i)}{1 + n_j}

    The sum runs over the batch, so γ depends on the batch size. Centers start at zero and are not learned by the
    optimizer: call :meth:`step` after each optimizer step. A class without a sample since the last step (n_j = 0)
    keeps its center. Evaluation mode leaves the centers alone.

    Where labels are probabilities, as of mixed images, the loss of a sample is the mean of its losses for the labels,
    :math:`\frac{\gamma}{2} \sum_j y_{ij} \lVert x_i - c_j \rVert^2`, and it moves each center by its share y_ij in it.

    Args:
        num_classes: number of classes.
        feature_dim: length of a feature vector.
        weight: γ.
        alpha: α, the share of the way that a center moves.
        start: the first epoch, or the first stage, in which it is part of the training loss.

    Attributes:
        centers: c, (num_classes, feature_dim), a buffer.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.

    Example:
        >>> center_loss = CenterLoss(num_classes=2, feature_dim=1, weight=1.0)
        >>> center_loss(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]))
        tensor(10.)
        >>> center_loss.step()
        >>> center_loss.centers  # half of 6 / (1 + 2); no sample of class 1
        tensor([[1.],
                [0.]])
    """

    label = "center loss"
    in_evaluation = False
    sums_over_update = True
    centers: Tensor

    def __init__(
        self, num_classes: int, feature_dim: int, weight: float, alpha: float = 0.5, start: int | str = 0
    ) -> None:
        super().__init__(start)
        for name, size in (("num_classes", num_classes), ("feature_dim", feature_dim)):
            check_integer(name, size, 1)
        check_number("weight", weight, 0)
        check_share("alpha", alpha)
        self.weight, self.alpha = weight, alpha
        self.register_buffer("centers", torch.zeros(num_classes, feature_dim))
        # Since the last step: the sum of each class's features beside its number of samples. Not a buffer, because
        # DDP overwrites buffers with those of the first process.
        self.gathered: Tensor | None = None

    def value(self, outputs: Outputs, batches: int) -> Tensor:
        loss: Tensor = self(outputs.features, outputs.labels)
        return loss * batches

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of ``features`` (B, feature_dim): a scalar, at least float32.

        Args:
            features: (B, feature_dim).
            labels: (B,) int64, or their probabilities (B, num_classes).
        """
        features = features.to(torch.promote_types(features.dtype, self.centers.dtype))
        if self.training:
            self._gather(features.detach(), labels)
        if not labels.is_floating_point():
            return 0.5 * self.weight * (features - self.centers[labels]).square().sum()
        with torch.autocast(features.device.type, enabled=False):
            labels = labels.to(self.centers.dtype)
            means = labels @ self.centers
            # Σ y ‖x - c‖² = ‖x - Σ y c‖² + Σ y ‖c‖² - ‖Σ y c‖²
            spread = (labels @ self.centers.square()).sum() - means.square().sum()
            return 0.5 * self.weight * ((features - means).square().sum() + spread)

    @torch.no_grad()
    def step(self) -> None:
        """Move the centers by the features since the last step, of all processes together."""
        if self.gathered is None:
            return
        gathered, self.gathered = self.gathered, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gathered)
        sums, counts = gathered[:, :-1], gathered[:, -1:]
        self.centers -= self.alpha * (counts * self.centers - sums) / (1 + counts)

    def pending(self) -> dict[str, Tensor]:
        return {} if self.gathered is None else {"gathered": self.gathered}

    def restore_pending(self, pending: dict[str, Tensor]) -> None:
        self.gathered = pending["gathered"].to(self.centers) if pending else None

    def _gather(self, features: Tensor, labels: Tensor) -> None:
        if self.gathered is None:
            classes, dim = self.centers.shape
            self.gathered = self.centers.new_zeros(classes, dim + 1)
        ones = features.new_ones(len(features), 1)
        added = torch.cat([features, ones], dim=1).to(self.gathered.dtype)
        if not labels.is_floating_point():
            self.gathered.index_add_(0, labels, added)
            return
        with torch.autocast(features.device.type, enabled=False):
            self.gathered += labels.to(added.dtype).T @ added

    def extra_repr(self) -> str:
        classes, dim = self.centers.shape
        return f"{classes}, {dim}, weight={self.weight}, alpha={self.alpha}"
