"""Networks from outside this package in a LightningModule."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pcnn_lightning.backbones.external import (
    ACTIVATIONS,
    SplitNetwork,
    converted_network,
    external_network,
    front_of,
    users_network,
)
from pcnn_lightning.checks import check_choice
from pcnn_lightning.conversion import ConversionReport

OPTIONS = ("include", "exclude", "overrides", "pointwise", "activations")
"""Keys of ``convert``."""
PACKAGE, LIBRARY, OWN = "this package", "torchvision and timm", "your own"
MEANT_FOR: dict[str, tuple[Any, tuple[str, ...]]] = {
    "widths": (None, (PACKAGE,)),
    "dropout": (0, (PACKAGE,)),
    "activation_threshold": (False, (PACKAGE,)),
    "two_slopes": (False, (PACKAGE,)),
    "convert": ({}, (LIBRARY, OWN)),
    "pretrained": (False, (LIBRARY,)),
    "small_images": (False, (LIBRARY,)),
}
"""Arguments about the network: their defaults, and the networks that they are for."""


def is_external(hparams: Mapping[str, Any]) -> bool:
    """Whether the network is not one of this package's."""
    return hparams["network"] is not None or "/" in hparams["backbone"]


def check_external(hparams: Mapping[str, Any]) -> None:
    """Require that each argument about the network is for a network of that kind.

    Raises:
        ValueError: names the argument.
    """
    kind = OWN if hparams["network"] is not None else LIBRARY if is_external(hparams) else PACKAGE
    for name, (default, kinds) in MEANT_FOR.items():
        if kind not in kinds and hparams[name] not in (default, None):
            network = hparams["network"] or hparams["backbone"]
            whose = " or ".join(kinds)
            raise ValueError(f"{name} is for networks of {whose}, not for {network}, but got {hparams[name]!r}")
    if unknown := [name for name in hparams["convert"] or {} if name not in OPTIONS]:
        raise ValueError(f"convert must have the keys {', '.join(OPTIONS)} only, but got {unknown[0]}")


def build_external(
    hparams: Mapping[str, Any], convolution: Callable[..., nn.Module], activation: Callable[..., nn.Module]
) -> tuple[SplitNetwork, ConversionReport | None]:
    """Build a network from outside this package, and convert it unless it is to be in full precision.

    Args:
        hparams: arguments of ``OneBitClassifier``.
        convolution: makes a 1-bit layer from the arguments of ``nn.Conv2d``.
        activation: makes the module in front of it, if activations are to be 1-bit.
    """
    num_classes, in_channels = hparams["num_classes"], hparams["in_channels"]
    if hparams["network"] is not None:
        network = users_network(hparams["network"], num_classes, in_channels)
    else:
        network = external_network(
            hparams["backbone"],
            num_classes,
            in_channels,
            pretrained=hparams["pretrained"],
            small_images=hparams["small_images"],
        )
    options = dict(hparams["convert"] or {})
    kind = options.pop("activations", "real")
    check_choice("convert.activations", kind, ACTIVATIONS)
    if kind != "real" and activation is nn.Identity:
        raise ValueError(f"convert.activations must be real, since this model has real activations, but got {kind}")
    size = hparams["image_size"] or ((32, 32) if hparams["small_images"] else (224, 224))
    layer = None if hparams["full_precision"] else convolution
    return converted_network(network, (in_channels, *size), layer, activation=front_of(kind, activation), **options)
