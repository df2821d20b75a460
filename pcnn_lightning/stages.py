"""The stages of a network, and what callbacks may ask of a module that trains through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from pcnn_lightning.layers import QuantizedConv2d
    from pcnn_lightning.losses import LossTerm

STAGES = {"full_precision": 0, "real": 1, "ternary": 2, "binary": 3}
"""Stages in training order, with the number that each one has in the logs.

``full_precision`` has ordinary convolutions; in ``real``, 1-bit layers convolve with unquantized kernels (U-MCN).
"""


class StagedModule(Protocol):
    """The contract between callbacks and a LightningModule with 1-bit layers.

    The module owns the stage: it saves and restores it, and tells its layers. A callback decides only when it changes.
    """

    stage: str
    """The current stage, a key of :data:`STAGES`."""
    stage_start: int
    """Epoch in which the stage began."""
    stage_end: int | None
    """Epoch in which the stage is planned to end, over which learning rates are laid; None: with the run."""

    @property
    def trained_stages(self) -> tuple[str, ...]:
        """The stages that a run can go through, in order."""

    @property
    def one_bit_layers(self) -> Mapping[str, QuantizedConv2d]:
        """The 1-bit convolutions from input to output, by their names in ``net``."""

    @property
    def terms(self) -> Mapping[str, LossTerm]:
        """The terms of the training loss, by their names in the logs."""

    @property
    def hparams(self) -> Mapping[str, Any]:
        """Hyperparameters, all of them primitives."""

    def begin_stage(self, stage: str, epoch: int) -> None:
        """Go to ``stage`` at the start of ``epoch``: schedules and the optimizer's state begin anew."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, in_channels, H, W)."""
