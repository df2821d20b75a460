"""Projection convolutional networks."""

from functools import partial
from typing import Any, Literal

import torch

from pcnn_lightning.checks import check_choice, check_integer
from pcnn_lightning.errors import InputError
from pcnn_lightning.functional import Normalization, ProjectionForward, SignGradient
from pcnn_lightning.layers import ProjectionConv2d, SignActivation
from pcnn_lightning.layers.projection import ProjectionInit
from pcnn_lightning.modules.second_rate import TwoRateClassifier


class PCNN(TwoRateClassifier):
    """A projection convolutional network (Gu et al., AAAI 2019), ternary or binary.

    The loss is cross-entropy + projection loss + center loss (3.61). The other keyword arguments are those of
    :class:`TwoRateClassifier` and :class:`OneBitClassifier`.

    Args:
        projections: J, projections per layer and channels per feature map.
        stage: the first stage: ``real``, ``ternary`` (``StageSwitch`` turns it into binary) or ``binary``; a
            ``StagePlan`` names its own.
        sigma: σ of the ternary threshold, in units of mean|C|.
        projection_loss_weight: λ.
        eta: η of the projection loss (3.42).
        projection_forward: quantize with all of W_j (``full``) or its mean (``mean``); None: full for J > 1, mean for
            J = 1.
        projection_init: distribution of the initial W: ``normal``, ``signs``, ``near_one`` or ``ones``; None: normal
            with the full forward, near one with the mean.
        normalization: ``center`` or ``standardize`` each filter before it is projected, or ``none``.
        reinit_projection: whether W is drawn again where a binary stage follows a ternary or real one, and where a
            run starts from ``init_from``, unless with real kernels, of which W is a part.
        activation_gradient: ``clip`` or ``polynomial``: pseudo-gradient of the sign of activations.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    family = "PCNN"

    def __init__(
        self,
        *,
        projections: int = 4,
        stage: Literal["real", "ternary", "binary"] = "binary",
        sigma: float = 0.7,
        projection_loss_weight: float = 1e-4,
        eta: float = 0.0,
        projection_forward: ProjectionForward | None = None,
        projection_init: ProjectionInit | None = None,
        normalization: Normalization = "none",
        reinit_projection: bool = False,
        activation_gradient: SignGradient = "clip",
        **others: Any,
    ) -> None:
        super().__init__(**others)
        check_integer("projections", projections, 1)
        check_choice("stage", stage, ("real", "ternary", "binary"))

        names = ("sigma", "projection_loss_weight", "eta", "projection_forward", "projection_init", "normalization")
        options = {name: self.hparams[name] for name in names}

        def convolution(*shape: Any, planes: int = projections, **own: Any) -> ProjectionConv2d:
            return ProjectionConv2d(*shape, **({**options, "projections": planes} | own))

        self.build_network(convolution, partial(SignActivation, activation_gradient), projections)
        if self.one_bit_layers:
            self.set_stage(stage)
        # Drawn once per run and saved in checkpoints, so that a resumed run draws the same W at the switch.
        self.projection_seed = int(torch.randint(2**31, ()))

    def begin_stage(self, name: str, epoch: int) -> None:
        stage = self.plan[name]
        becomes_binary = stage.stage == "binary" != self.stage and not stage.layer_by_layer
        super().begin_stage(name, epoch)
        if self._is_to_redraw(becomes_binary):
            self._redraw_projections()

    def on_train_start(self) -> None:
        stages, first = self.trained_stages, self.hparams["stage"]
        resumed = self.trainer.ckpt_path is not None and not self.plan
        if resumed and self.one_bit_layers and stages.index(self.stage) < stages.index(first):
            raise InputError(
                f"the checkpoint is of a {self.stage} stage, but model.stage is {first}: to start a {first} run from "
                f"{self.stage} kernels, name the checkpoint as model.init_from instead of --ckpt_path"
            )
        super().on_train_start()

    def start_from(self, path: str) -> None:
        super().start_from(path)
        if self._is_to_redraw(self.stage != "real" and self.has_entered):
            self._redraw_projections()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["one_bit"]["projection_seed"] = self.projection_seed

    def restore(self, saved: dict[str, Any]) -> None:
        super().restore(saved)
        self.projection_seed = saved["projection_seed"]

    def _is_to_redraw(self, by_default: bool) -> bool:
        """Whether the current stage, or else the model, asks for a new W."""
        asked = None if self._stage is None else self._stage.reinit_projection
        return bool(self.hparams["reinit_projection"]) and by_default if asked is None else asked

    def _redraw_projections(self) -> None:
        """Draw W again, from one seed in all processes and another one in each stage."""
        self.projection_seed = self.trainer.strategy.broadcast(self.projection_seed)
        index = list(self.plan).index(self._name) if self.plan else 0
        generator = torch.Generator().manual_seed(self.projection_seed + index)
        for layer in self.one_bit_layers.values():
            if isinstance(layer, ProjectionConv2d):
                layer.reset_projection(generator)
