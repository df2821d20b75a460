"""A term of the training loss, and the two that nearly every 1-bit network has."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcnn_lightning.checks import check_integer, check_number
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import QuantizedConv2d


class Outputs(NamedTuple):
    """What a network makes of a batch, from which loss terms are computed.

    Attributes:
        features: (B, feature_dim), the input of the classifier.
        logits: (B, num_classes).
        labels: (B,) int64; or their probabilities (B, num_classes), in training with mixup or cutmix.
        layers: the 1-bit convolutions of the network.
        teacher_logits: (B, num_classes), those of the network's teacher; None without one, and in evaluation.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    layers: Sequence[QuantizedConv2d]
    teacher_logits: Tensor | None = None


class LossTerm(nn.Module):
    """A weighted term of the loss, with whatever state it has.

    Its name in the logs is the one under which it is added to ``OneBitClassifier.terms``. State that belongs to
    checkpoints is kept in buffers; state of an unfinished update is handed out by :meth:`pending`.

    Args:
        start: the first epoch with this term, or the first stage; earlier, the term takes no part.

    Attributes:
        label: its name in figures.
        unit: its unit in figures.
        depends_on_data: False if the term has the same value for any batch, as a penalty on the weights has.
        in_evaluation: whether the term is part of the loss in validation and test; if not, validation only logs it.
        training_only: whether the term is computed in training only, and validation does not even log it.
        sums_over_update: whether the term is a sum over the samples of an update, and not a mean.
    """

    label = ""
    unit = "weighted"
    depends_on_data = True
    in_evaluation = True
    training_only = False
    sums_over_update = False

    def __init__(self, start: int | str = 0) -> None:
        super().__init__()
        if not isinstance(start, str):
            check_integer("start", start, 0)
        self.start = start

    @abstractmethod
    def value(self, outputs: Outputs, batches: int) -> Tensor:
        """The weighted term, a scalar.

        Args:
            outputs: what the network made of a batch.
            batches: number of batches and processes that the loss of an update is averaged over, for terms that are
                sums over an update.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement value()")

    def begin_evaluation(self, layers: Sequence[QuantizedConv2d]) -> None:
        """Called before a validation or test epoch, in which no parameter changes."""

    def step(self) -> None:
        """Called after each optimizer step."""

    def pending(self) -> dict[str, Tensor]:
        """State of an unfinished update, to be saved in a checkpoint."""
        return {}

    def restore_pending(self, pending: dict[str, Tensor]) -> None:
        """Restore what :meth:`pending` returned; forget everything if that is empty."""


class CrossEntropy(LossTerm):
    r"""Cross-entropy of the logits, L_S.

    With weights w of the classes and probabilities y of the labels, smoothed to y', training has the weighted mean over
    a batch

    .. math::
        L_S = -\frac{\sum_i \sum_c w_c\, y'_{ic} \log p_{ic}}{\sum_i \sum_c w_c\, y_{ic}}

    which is :func:`torch.nn.functional.cross_entropy` for labels that are indices. Evaluation has the plain mean.

    Args:
        label_smoothing: label smoothing, in training only.
        class_weights: a number above zero for each class, in training only; None for equal weights.
        weight: factor of the term, in training only.

    Attributes:
        class_weights: (num_classes,) or None, a buffer that checkpoints do not hold.

    Raises:
        ValueError: if ``label_smoothing`` is not in [0, 1), or ``weight`` is negative.
    """

    label = "cross-entropy"
    class_weights: Tensor | None

    def __init__(
        self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None, weight: float = 1.0
    ) -> None:
        super().__init__()
        check_number("label_smoothing", label_smoothing, 0, below=1)
        check_number("weight", weight, 0)
        self.label_smoothing, self.weight = label_smoothing, weight
        self.unit = "nats" if weight == 1 else f"nats, training × {weight:g}"
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def balance(self, counts: Sequence[int]) -> None:
        """Change the weights of C classes to n / (C · n_c), for ``counts`` n_c of their images, n in all.

        Raises:
            InputError: if a class has no images.
        """
        if 0 in counts:
            missing = counts.index(0)
            raise InputError(f"class_weights must be a list, not balanced: class {missing} has no training images")
        assert self.class_weights is not None
        self.class_weights.copy_(torch.tensor([sum(counts) / (len(counts) * count) for count in counts]))

    def value(self, outputs: Outputs, batches: int = 1) -> Tensor:
        logits, labels, weights = outputs.logits, outputs.labels, self.class_weights
        if not self.training:
            return F.cross_entropy(logits, labels)
        if weights is None:
            return self.weight * F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # torch's own mean is over samples, without their weights, if labels are probabilities.
        total = F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing, reduction="sum")
        return self.weight * total / (labels * weights if labels.is_floating_point() else weights[labels]).sum()


class QuantizationLoss(LossTerm):
    """Sum of the quantization losses of all 1-bit layers, each weighted with λ (3.42) or θ (3.18).

    Args:
        label: its name in figures.
    """

    depends_on_data = False

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label
        self._in_evaluation: Tensor | None = None

    def value(self, outputs: Outputs, batches: int = 1) -> Tensor:
        if not self.training and self._in_evaluation is not None and not torch.is_grad_enabled():
            return self._in_evaluation
        return self._sum(outputs.layers)

    def begin_evaluation(self, layers: Sequence[QuantizedConv2d]) -> None:
        self._in_evaluation = self._sum(layers).detach()

    def train(self, mode: bool = True) -> "QuantizationLoss":
        self._in_evaluation = None  # parameters change in training
        return super().train(mode)

    @staticmethod
    def _sum(layers: Sequence[QuantizedConv2d]) -> Tensor:
        losses = [loss for layer in layers if (loss := layer.quantization_loss()) is not None]
        return torch.stack(losses).sum()
