"""Plain binary networks."""

from functools import partial
from typing import Any

from torch import nn

from pcnn_lightning.functional import Normalization, SignGradient
from pcnn_lightning.functional.binary import Scaling, WeightGradient
from pcnn_lightning.layers import BinaryConv2d, SignActivation
from pcnn_lightning.modules.classifier import OneBitClassifier


class BNN(OneBitClassifier):
    """A plain binary network: the baseline of PCNN and MCN, trained by the same recipe with one learning rate.

    The loss is cross-entropy + center loss. The other keyword arguments are those of :class:`OneBitClassifier`.

    ===============  ===================================  ====================================================
    XNOR-Net         (the default)                        https://arxiv.org/abs/1603.05279, without its scale of
                                                          the activations
    Bi-Real Net      ``activation_gradient: polynomial``  https://arxiv.org/abs/1808.00278; as published, also
                                                          ``weight_gradient: scaled``
    BWN              ``sign_activations: false``          https://arxiv.org/abs/1603.05279
    ===============  ===================================  ====================================================

    Args:
        sign_activations: 1-bit activations; False leaves them real.
        activation_gradient: ``clip`` or ``polynomial``: pseudo-gradient of the sign of activations.
        scaling: one scale per output ``channel``, per ``layer``, or ``none``.
        weight_gradient: ``clip``, ``identity`` or ``scaled``: gradient of the sign of kernels.
        normalization: ``center`` or ``standardize`` each filter before its sign is taken, or ``none``.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    family = "BNN"

    def __init__(
        self,
        *,
        sign_activations: bool = True,
        activation_gradient: SignGradient = "clip",
        scaling: Scaling = "channel",
        weight_gradient: WeightGradient = "clip",
        normalization: Normalization = "none",
        **others: Any,
    ) -> None:
        super().__init__(**others)

        options = {"scaling": scaling, "gradient": weight_gradient, "normalization": normalization}

        def convolution(*shape: Any, planes: int = 1, **own: Any) -> BinaryConv2d:
            return BinaryConv2d(*shape, **(options | own))

        self.build_network(
            convolution, partial(SignActivation, activation_gradient) if sign_activations else nn.Identity
        )
