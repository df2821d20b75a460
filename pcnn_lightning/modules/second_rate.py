"""A second learning rate."""

from typing import Any

from pcnn_lightning.modules.classifier import OneBitClassifier
from pcnn_lightning.modules.optimization import group_settings
from pcnn_lightning.modules.schedules import Schedule


class TwoRateClassifier(OneBitClassifier):
    """A classifier whose 1-bit layers have a second parameter, learned at η₂.

    The other keyword arguments are those of :class:`OneBitClassifier`.

    Args:
        eta2: η₂, learning rate of the second parameters: projections or M-Filters.
        projection_schedule: schedule of η₂; None follows η₁.
        projection_milestones: milestones of η₂; None follows η₁.
        projection_decay: decay of η₂; None follows η₁.
        projection_warmup_epochs: warm-up of η₂; None follows η₁.
        projection_weight_decay: weight decay of the second parameters.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    def __init__(
        self,
        *,
        eta2: float = 0.001,
        projection_schedule: Schedule | None = None,
        projection_milestones: list[float] | None = None,
        projection_decay: float | None = None,
        projection_warmup_epochs: float | None = None,
        projection_weight_decay: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        hparams = self.hparams
        schedule = hparams["schedule"] if projection_schedule is None else projection_schedule
        milestones = hparams["milestones"] if projection_milestones is None else projection_milestones
        decay = hparams["decay"] if projection_decay is None else projection_decay
        warmup = hparams["warmup_epochs"] if projection_warmup_epochs is None else projection_warmup_epochs
        shape = (schedule, tuple(milestones), decay, warmup)
        self.groups += (group_settings("eta2", eta2, *shape, projection_weight_decay, prefix="projection_"),)
