"""Backbones, selected by name.

To add a backbone, write a function in a module of its own and register it in :data:`BACKBONES`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from pcnn_lightning.backbones.blocks import BLOCK_OPTIONS, Activation, Convolution, Network, OneBitBlock
from pcnn_lightning.backbones.mcn import mcn_small, mcn_wide
from pcnn_lightning.backbones.resnet import resnet
from pcnn_lightning.backbones.vgg import vgg_small
from pcnn_lightning.backbones.wide_resnet import wide_resnet
from pcnn_lightning.checks import check_bool, check_choice, check_integer, check_number

Backbone = Callable[..., Network]
"""Takes ``(num_classes, in_channels, convolution, activation)``, ``widths``, ``planes`` and, in some, ``dropout`` or
``**block``, the options of :class:`OneBitBlock`."""

BACKBONES: dict[str, Backbone] = {
    "wrn7": partial(wide_resnet, depth=7),
    "wrn10": partial(wide_resnet, depth=10),
    "wrn22": partial(wide_resnet, depth=22),
    "wrn40": partial(wide_resnet, depth=40),
    "resnet18": partial(resnet, depth=18),
    "resnet34": partial(resnet, depth=34),
    "resnet18_cifar": partial(resnet, depth=18, stem="cifar"),
    "resnet34_cifar": partial(resnet, depth=34, stem="cifar"),
    "vgg_small": vgg_small,
    "mcn8": partial(mcn_wide, depth=8),
    "mcn20": partial(mcn_wide, depth=20),
    "mcn_small": mcn_small,
}


def build_backbone(
    name: str,
    num_classes: int,
    in_channels: int,
    convolution: Convolution,
    activation: Activation,
    *,
    widths: list[int] | None = None,
    planes: int = 1,
    dropout: float = 0.0,
    **block: bool,
) -> Network:
    """Build a backbone by name.

    Args:
        name: a key of :data:`BACKBONES`.
        num_classes: number of classes.
        in_channels: number of channels of the images.
        convolution: factory of the 1-bit convolutions.
        activation: factory of the modules that binarize their inputs.
        widths: kernel widths, i.e. number of feature maps of the stem and of each stage; None takes the default of the
            backbone.
        planes: J or K, number of channels per feature map.
        dropout: dropout rate, in [0, 1); must be 0 for backbones without dropout.
        block: options of :class:`OneBitBlock`, ``activation_threshold`` and ``two_slopes``; must be false for backbones
            without such blocks.

    Raises:
        ValueError: if there is no backbone of that name, or an argument is invalid.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, but got {name!r}")
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        check_integer(argument, value, 1)
    check_number("dropout", dropout, 0, below=1)
    for option, value in block.items():
        check_choice("block", option, BLOCK_OPTIONS)
        check_bool(option, value)
    chosen: dict[str, Any] = {} if widths is None else {"widths": widths}
    parameters = inspect.signature(BACKBONES[name]).parameters
    if "dropout" in parameters:
        chosen["dropout"] = dropout
    elif dropout > 0:
        raise ValueError(f"dropout must be 0 for backbone {name}, which has no dropout, but got {dropout}")
    if "block" in parameters:
        chosen |= block
    elif on := [option for option, value in block.items() if value]:
        raise ValueError(f"{on[0]} must be false for backbone {name}, which has no blocks with options, but got True")
    return BACKBONES[name](num_classes, in_channels, convolution, activation, planes=planes, **chosen)


__all__ = ["BACKBONES", "BLOCK_OPTIONS", "Network", "OneBitBlock", "build_backbone"]
