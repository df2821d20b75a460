"""A second learning rate."""

from collections.abc import Mapping
from typing import Any

from pcnn_lightning.modules.classifier import OneBitClassifier
from pcnn_lightning.modules.optimization import SECOND, GroupSettings, group_settings
from pcnn_lightning.stages import Schedule


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

    def group_settings(self, settings: Mapping[str, Any]) -> dict[str, GroupSettings]:
        first = super().group_settings(settings)
        own = {name: settings[f"projection_{name}"] for name in ("schedule", "milestones", "decay", "warmup_epochs")}
        shape = {name: settings[name] if value is None else value for name, value in own.items()}
        second = group_settings("eta2", settings["eta2"], shape, settings["projection_weight_decay"], "projection_")
        return {**first, SECOND: second}
