"""The stages of a network, a plan of them, and what callbacks may ask of a module that trains through them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pcnn_lightning.checks import check_choice, check_given, check_number, check_positive

if TYPE_CHECKING:
    from torch import Tensor

    from pcnn_lightning.layers import QuantizedConv2d
    from pcnn_lightning.losses import LossTerm

Schedule = Literal["constant", "multistep", "cosine", "exponential"]
"""How a learning rate changes over a stage."""
STAGES = {"full_precision": 0, "real": 1, "ternary": 2, "binary": 3}
"""Kinds of stages, with the number that each one has in the logs.

``full_precision`` has ordinary convolutions; in ``real``, 1-bit layers convolve with unquantized kernels.
"""
ENTERING = "to_"
"""Prefix of the name of a stage that only some of the layers have entered."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run: what it trains, for how long, and the arguments of the model that it overrides.

    Args:
        stage: its kind: ``real``, ``ternary`` or ``binary`` kernels.
        epochs: its length in epochs or, below 1, as a share of ``max_epochs``. Only the last stage of a plan may leave
            it out, and takes the rest.
        activations: ``real`` trains without the sign of the activations, ``sign`` with it; None: as the model has them.
        layer_by_layer: share of the stage over which the layers enter it one after the other, from the input to the
            output; 0: all of them at its start.
        reinit_projection: whether W is drawn again at its start; None: as the model says.
        eta1: η₁.
        schedule: schedule of η₁.
        milestones: shares of the stage at which ``multistep`` multiplies by ``decay``.
        decay: factor of ``multistep`` and ``exponential``.
        warmup_epochs: epochs of linear warm-up.
        eta2: η₂.
        projection_schedule: schedule of η₂.
        projection_milestones: milestones of η₂.
        projection_decay: decay of η₂.
        projection_warmup_epochs: warm-up of η₂.
        optimizer: ``sgd`` or ``adam``.
        momentum: momentum of ``sgd``.
        nesterov: whether ``sgd`` uses Nesterov momentum.
        weight_decay: weight decay of what is learned at η₁.
        kernel_weight_decay: weight decay of the latent kernels of 1-bit layers.
        projection_weight_decay: weight decay of the second parameters.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    stage: Literal["real", "ternary", "binary"]
    epochs: float | None = None
    activations: Literal["real", "sign"] | None = None
    layer_by_layer: float = 0.0
    reinit_projection: bool | None = None
    eta1: float | None = None
    schedule: Schedule | None = None
    milestones: list[float] | None = None
    decay: float | None = None
    warmup_epochs: float | None = None
    eta2: float | None = None
    projection_schedule: Schedule | None = None
    projection_milestones: list[float] | None = None
    projection_decay: float | None = None
    projection_warmup_epochs: float | None = None
    optimizer: Literal["sgd", "adam"] | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None
    kernel_weight_decay: float | None = None
    projection_weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_given(type(self).__init__, vars(self))
        check_choice("stage", self.stage, ("real", "ternary", "binary"))
        if self.epochs is not None:
            check_length("epochs", self.epochs)
        if self.activations is not None:
            check_choice("activations", self.activations, ("real", "sign"))
        check_number("layer_by_layer", self.layer_by_layer, 0, below=1)
        if self.reinit_projection and self.layer_by_layer:
            raise ValueError(
                "reinit_projection must be false with layer_by_layer, since layers that are still real convolve "
                f"with W, but got {self.reinit_projection}"
            )

    @property
    def overrides(self) -> dict[str, Any]:
        """The hyperparameters of optimization that it overrides."""
        fields = (field.name for field in dataclasses.fields(self) if field.name not in _OF_A_STAGE)
        return {name: value for name in fields if (value := getattr(self, name)) is not None}

    def layers_entered(self, count: int, epoch: int, epochs: float) -> int:
        """How many of ``count`` layers have entered it.

        Args:
            count: number of layers.
            epoch: epochs since its start.
            epochs: its length.
        """
        if self.layer_by_layer == 0:
            return count
        steps = min(max(1, round(self.layer_by_layer * epochs)) + 1, epochs)  # the last of which completes it
        return min(count, math.ceil(count * (epoch + 1) / steps))


_OF_A_STAGE = ("stage", "epochs", "activations", "layer_by_layer", "reinit_projection")


def named(stages: Sequence[Stage]) -> dict[str, Stage]:
    """The stages of a plan by name: their kind, with a number from the second on."""
    kinds = [stage.stage for stage in stages]
    counts = [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)]
    names = [kind if count == 1 else f"{kind}_{count}" for kind, count in zip(kinds, counts, strict=True)]
    return dict(zip(names, stages, strict=True))


def is_stage_name(name: str) -> bool:
    """Whether ``name`` may be that of a stage, such as ``binary`` or ``binary_2``."""
    return re.fullmatch(r"full_precision|(real|ternary|binary)(_[1-9]\d*)?", name) is not None


def check_length(name: str, epochs: float) -> None:
    """Require a share of a run or a number of epochs."""
    check_positive(name, epochs)
    if epochs > 1 and epochs != int(epochs):
        raise ValueError(f"{name} must be a share in (0, 1) or a positive whole number, but got {epochs}")


class StagedModule(Protocol):
    """The contract between callbacks and a LightningModule with 1-bit layers.

    The module owns the stage: it saves and restores it, and tells its layers. A callback decides only when it changes.
    """

    next_plan: dict[str, Stage]
    """The stages of the run by name, for a callback to set in its ``setup``."""
    plan: dict[str, Stage]
    """The stages of the run by name; empty if it has no plan."""
    stage_start: int
    """Epoch in which the stage began."""
    stage_end: int | None
    """Epoch in which the stage is planned to end, over which learning rates are laid; None: with the run."""

    @property
    def stage(self) -> str:
        """The kind of the current stage, a key of :data:`STAGES`."""

    @property
    def stage_name(self) -> str:
        """What logs and files call the current stage: ``binary_2``, or ``to_binary`` while layers enter it."""

    @property
    def has_entered(self) -> bool:
        """Whether all layers are in the current stage."""

    @property
    def trained_stages(self) -> tuple[str, ...]:
        """The kinds of stages that a run can go through, in order."""

    @property
    def one_bit_layers(self) -> Mapping[str, QuantizedConv2d]:
        """The 1-bit convolutions from input to output, by their names in ``net``."""

    @property
    def terms(self) -> Mapping[str, LossTerm]:
        """The terms of the training loss, by their names in the logs."""

    @property
    def hparams(self) -> Mapping[str, Any]:
        """Hyperparameters, all of them primitives."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Hyperparameters, as the current stage overrides them."""

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """η₁ and, if there is one, η₂, by the groups of parameters that are learned at them."""

    def check_stage(self, name: str, stage: Stage) -> None:
        """Require that the network can be trained in ``stage``."""

    def take_stage(self, name: str, stage: Stage) -> None:
        """Train in ``stage`` from now on, which logs and files call by its name."""

    def begin_stage(self, name: str, epoch: int) -> None:
        """Go to a stage of the plan at the start of ``epoch``: schedules and the optimizer's state begin anew."""

    def enter_layers(self, count: int) -> None:
        """Let the first ``count`` 1-bit layers be in the current stage, and the others in the one before."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, in_channels, H, W)."""
