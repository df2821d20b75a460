"""Projection convolutional networks."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pcnn_lightning.errors import InputError
from pcnn_lightning.functional import ProjectionForward, SignGradient
from pcnn_lightning.layers import ProjectionConv2d, ProjectionInit, SignActivation
from pcnn_lightning.modules.classifier import OneBitClassifier


class PCNN(OneBitClassifier):
    """A projection convolutional network (Gu et al., AAAI 2019), ternary or binary, and its training.

    The total loss is cross-entropy + projection loss + center loss (3.61). All other keyword arguments are those of
    :class:`OneBitClassifier`.

    Args:
        projections: J, projections per layer and channels per map.
        stage: the first stage: ``ternary`` (to be switched to binary by ``StageSwitch``) or ``binary``.
        full_precision: the reference: the same blocks with ordinary convolutions and no sign.
        sigma: σ of the ternary threshold, in units of mean|C|.
        projection_loss_weight: λ.
        eta: η of the projection loss (3.42).
        projection_forward: ``full`` or ``mean``: how much of W_j quantises; None: full for J > 1, mean for J = 1.
        projection_init: ``normal``, ``signs``, ``near_one`` or ``ones``: how W is drawn; None: normal with the full
            forward, near one with the mean.
        reinit_projection: whether W is drawn anew where the binary stage starts from ternary kernels.
        activation_gradient: ``clip`` or ``polynomial``: pseudo-gradient of the sign of activations.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    family = "PCNN"
    trained_stages = ("ternary", "binary")

    def __init__(
        self,
        *,
        projections: int = 4,
        stage: Literal["ternary", "binary"] = "binary",
        full_precision: bool = False,
        sigma: float = 0.7,
        projection_loss_weight: float = 1e-4,
        eta: float = 0.0,
        projection_forward: ProjectionForward | None = None,
        projection_init: ProjectionInit | None = None,
        reinit_projection: bool = False,
        activation_gradient: SignGradient = "clip",
        **others: Any,
    ) -> None:
        super().__init__(**others)
        if projections < 1:
            raise ValueError(f"projections must be at least 1, but got {projections}")
        if stage not in ("ternary", "binary"):
            raise ValueError(f"stage must be one of ternary, binary, but got {stage!r}")

        def convolution(*shape: int, planes: int = projections) -> ProjectionConv2d:
            return ProjectionConv2d(
                *shape,
                projections=planes,
                sigma=sigma,
                projection_loss_weight=projection_loss_weight,
                eta=eta,
                projection_forward=projection_forward,
                projection_init=projection_init,
            )

        if full_precision:
            self.build_network(None, nn.Identity, projections)
        else:
            self.build_network(convolution, partial(SignActivation, activation_gradient), projections)
        self.set_stage("full_precision" if full_precision else stage)
        # Drawn once a run and kept in its checkpoints, so that a resumed run draws the same W at the switch.
        self.projection_seed = int(torch.randint(2**31, ()))

    @property
    def projection_layers(self) -> list[ProjectionConv2d]:
        """The projection convolutions, from input to output."""
        return [layer for layer in self.net.modules() if isinstance(layer, ProjectionConv2d)]

    def projection_parameters(self) -> list[nn.Parameter]:
        return [layer.projection for layer in self.projection_layers]

    def set_stage(self, stage: str) -> None:
        super().set_stage(stage)
        for layer in self.projection_layers:
            layer.levels = stage  # type: ignore[assignment]

    def begin_stage(self, stage: str, epoch: int) -> None:
        super().begin_stage(stage, epoch)
        if self.hparams["reinit_projection"]:
            self._redraw_projections()

    def on_train_start(self) -> None:
        if self.stage == "ternary" and self.hparams["stage"] == "binary":
            raise InputError(
                "the checkpoint is of a ternary stage, but model.stage is binary: to start a binary run from ternary "
                "kernels, name the checkpoint as model.init_from instead of --ckpt_path"
            )
        if self.hparams["eta"] > 0 and (self.hparams["accumulate"] > 1 or self.trainer.world_size > 1):
            for layer in self.projection_layers:
                layer.sum_step_gradients()
        super().on_train_start()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for layer in self.projection_layers:
            layer.add_eta_square()
        super().on_before_optimizer_step(optimizer)

    def pending(self) -> dict[str, Tensor]:
        left = {name: total.grad for name, total in self._step_sums().items() if total.grad is not None}
        return {
            **super().pending(),
            **{name: self.trainer.strategy.reduce(grad, "mean") for name, grad in left.items()},
        }

    def restore_pending(self, pending: dict[str, Tensor]) -> None:
        super().restore_pending(pending)
        for name, total in self._step_sums().items():
            if name in pending:
                total.grad = pending[name].to(total)

    def _step_sums(self) -> dict[str, Tensor]:
        return {
            f"step_sums.{index}.{part}": total
            for index, layer in enumerate(self.projection_layers)
            for part, total in enumerate(layer.step_sums or ())
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["one_bit"]["projection_seed"] = self.projection_seed

    def restore(self, saved: dict[str, Any]) -> None:
        super().restore(saved)
        self.projection_seed = saved["projection_seed"]

    def _start_from(self, path: str) -> None:
        super()._start_from(path)
        if self.hparams["reinit_projection"]:
            self._redraw_projections()

    def _redraw_projections(self) -> None:
        # One seed for all processes, whatever each of them has drawn so far.
        self.projection_seed = self.trainer.strategy.broadcast(self.projection_seed)
        generator = torch.Generator().manual_seed(self.projection_seed)
        for layer in self.projection_layers:
            layer.reset_projection(generator)
