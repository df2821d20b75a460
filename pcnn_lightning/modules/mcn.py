"""Modulated convolutional networks."""

from typing import Any

from torch import nn

from pcnn_lightning.layers import ModulatedConv2d, ModulationInit
from pcnn_lightning.modules.classifier import OneBitClassifier


class MCN(OneBitClassifier):
    """A modulated convolutional network (Wang et al., CVPR 2018), and its training.

    The total loss is cross-entropy + filter loss + center loss (3.18). The paper's decays λ₁ and λ₂ are ``decay`` and
    ``projection_decay`` of ``schedule: exponential``. All other keyword arguments are those of
    :class:`OneBitClassifier`.

    Args:
        backbone: a name in ``pcnn_lightning.backbones.BACKBONES``.
        planes: K, M-Filters per layer and channels per map.
        average: MCN-1: one value a plane.
        levels: U, values of a kernel before modulation: 2 (by sign), 3 or 4 (by k-means, once an epoch).
        binarize: False is U-MCN, the reference: kernels are modulated as they are.
        scale: a of two levels; None takes each layer's mean|C|.
        filter_loss_weight: θ.
        modulation_init: ``normal``, ``uniform``, ``near_one`` or ``ones``: how M is drawn.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    family = "MCN"
    trained_stages = ("binary",)
    layer_loss = "filter_loss"
    second_rate = "modulations"

    def __init__(
        self,
        *,
        backbone: str = "mcn20",
        planes: int = 4,
        average: bool = False,
        levels: int = 2,
        binarize: bool = True,
        scale: float | None = None,
        filter_loss_weight: float = 1e-4,
        modulation_init: ModulationInit = "normal",
        **others: Any,
    ) -> None:
        super().__init__(backbone=backbone, **others)
        if planes < 1:
            raise ValueError(f"planes must be at least 1, but got {planes}")
        default_planes = planes

        def convolution(*shape: int, planes: int = default_planes) -> ModulatedConv2d:
            return ModulatedConv2d(
                *shape,
                planes=planes,
                average=average,
                levels=levels,
                filter_loss_weight=filter_loss_weight,
                binarize=binarize,
                scale=scale,
                modulation_init=modulation_init,
            )

        self.build_network(convolution, nn.Identity, planes)
        self.set_stage("binary" if binarize else "full_precision")

    @property
    def modulated_layers(self) -> list[ModulatedConv2d]:
        """The modulated convolutions, from input to output."""
        return [layer for layer in self.net.modules() if isinstance(layer, ModulatedConv2d)]

    def projection_parameters(self) -> list[nn.Parameter]:
        return [layer.modulation for layer in self.modulated_layers]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # rather than on_train_epoch_start, which a run resumed from the end of an epoch skips
            for layer in self.modulated_layers:
                layer.refresh_centers()
