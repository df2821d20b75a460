"""What a module asks of the labels and classes of its data."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from pcnn_lightning.checks import is_number
from pcnn_lightning.errors import InputError


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Require labels (B,) of the classes, or probabilities of labels (B, num_classes).

    Raises:
        InputError: says what a batch has instead.
    """
    if labels.is_floating_point():
        if labels.shape[1:] != (num_classes,):
            raise InputError(
                f"probabilities of labels must have the shape (B, {num_classes}), but the batch has "
                f"{tuple(labels.shape)}"
            )
        return
    low, high = labels.aminmax()
    if low < 0 or high >= num_classes:
        raise InputError(f"labels must lie in [0, {num_classes - 1}], but the batch has {int(low)} to {int(high)}")


def initial_class_weights(value: Any, num_classes: int) -> Sequence[float] | None:
    """The weights of the classes to begin with: ones for ``balanced``, until the data are known.

    Raises:
        ValueError: if it is neither ``balanced`` nor a positive number for each class nor None.
    """
    if value is None:
        return None
    if value == "balanced":
        return [1.0] * num_classes
    if (
        not isinstance(value, (list, tuple))
        or len(value) != num_classes
        or not all(is_number(one) and 0 < one < math.inf for one in value)
    ):
        raise ValueError(
            f"class_weights must be balanced or a list of {num_classes} positive numbers, but got {value!r}"
        )
    return value


def class_counts(trainer: Trainer) -> list[int]:
    """Number of training images of each class.

    Raises:
        InputError: if a data module from outside this package does not say it.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    counts: list[int] | None = getattr(data, "class_counts", None)
    if counts is None:
        raise InputError(
            f"class_weights must be a list, not balanced: {type(data).__name__} has no class_counts, the number of "
            "training images of each class"
        )
    return counts
