"""Modulated convolutional networks."""

from functools import partial
from typing import Any

from torch import nn

from pcnn_lightning.checks import check_integer
from pcnn_lightning.layers import ModulatedConv2d
from pcnn_lightning.layers.modulated import ModulationInit
from pcnn_lightning.modules.second_rate import TwoRateClassifier


class MCN(TwoRateClassifier):
    """A modulated convolutional network (Wang et al., CVPR 2018).

    The loss is cross-entropy + filter loss + center loss (3.18). The paper's decays λ₁ and λ₂ are ``decay`` and
    ``projection_decay`` with ``schedule: exponential``. The other keyword arguments are those of
    :class:`TwoRateClassifier` and :class:`OneBitClassifier`.

    Args:
        backbone: as for :class:`OneBitClassifier`; ``mcn8``, ``mcn20`` and ``mcn_small`` are MCN's own.
        planes: K, M-Filters per layer and channels per feature map.
        average: MCN-1: one value per plane.
        levels: U, number of values of a kernel before modulation: 2 (by sign), 3 or 4 (by k-means, once per epoch).
        binarize: False is U-MCN, the reference: kernels are modulated without quantization.
        scale: a of two levels; None takes mean|C| of each layer.
        filter_loss_weight: θ.
        modulation_init: distribution of the initial M: ``normal``, ``uniform``, ``near_one`` or ``ones``.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    family = "MCN"

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
        check_integer("planes", planes, 1)
        names = ("average", "levels", "filter_loss_weight", "binarize", "scale", "modulation_init")
        convolution = partial(ModulatedConv2d, planes=planes, **{name: self.hparams[name] for name in names})
        self.build_network(convolution, nn.Identity, planes)
