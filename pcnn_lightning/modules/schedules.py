"""Learning rates as closed-form functions of the position in a stage: without state, resuming is exact."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

from pcnn_lightning.checks import check_choice, check_number, is_number
from pcnn_lightning.stages import Schedule


@dataclass(frozen=True)
class LearningRate:
    """A learning rate schedule over one stage.

    Args:
        base: the highest learning rate.
        schedule: ``"constant"``; ``"multistep"`` multiplies by ``decay`` at each milestone; ``"cosine"`` decays to zero
            along half a cosine; ``"exponential"`` multiplies by ``decay`` after each epoch.
        milestones: fractions of the stage, increasing within (0, 1).
        decay: factor of ``"multistep"`` and ``"exponential"``.
        warmup_epochs: epochs of linear warm-up from zero at the start of the stage.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    base: float
    schedule: Schedule = "constant"
    milestones: tuple[float, ...] = ()
    decay: float = 1.0
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        check_number("a learning rate", self.base, 0)
        check_choice("schedule", self.schedule, get_args(Schedule))
        bounds = (0.0, *self.milestones, 1.0)
        if not all(map(is_number, bounds)) or not all(low < high for low, high in pairwise(bounds)):
            raise ValueError(
                f"milestones are shares of a stage and must rise within (0, 1), but got {list(self.milestones)}"
            )
        if not is_number(self.decay) or not 0 < self.decay <= 1:
            raise ValueError(f"decay must be a number in (0, 1], but got {self.decay!r}")
        check_number("warmup_epochs", self.warmup_epochs, 0)

    def at(self, epoch: float, epochs: float, step: float = 0.0) -> float:
        """Learning rate of one update.

        Args:
            epoch: epochs from the start of the stage to the start of the update, including fractions.
            epochs: length of the stage; ``math.inf`` if it has no end.
            step: length of an update in epochs, so that the first update of a warm-up is not wasted at a rate of zero.
        """
        if epoch < self.warmup_epochs:
            return self.base * min((epoch + step) / self.warmup_epochs, 1.0)
        if self.schedule == "multistep":
            # A tolerance of 1e-6 epochs, since 0.28 * 25 is slightly more than 7 in floating point.
            return self.base * self.decay ** sum(share * epochs <= epoch + 1e-6 for share in self.milestones)
        if self.schedule == "exponential":
            return self.base * self.decay ** math.floor(epoch + 1e-6)
        if self.schedule == "cosine" and epochs > self.warmup_epochs:
            passed = (epoch - self.warmup_epochs) / (epochs - self.warmup_epochs)
            return self.base * 0.5 * (1 + math.cos(math.pi * min(passed, 1.0)))
        return self.base
