"""Networks from outside this package in a LightningModule."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pcnn_lightning.backbones.external import SplitNetwork, converted_network, external_network, users_network
from pcnn_lightning.checks import check_choice
from pcnn_lightning.conversion import ConversionReport
from pcnn_lightning.layers import QuantizedConv2d

ACTIVATIONS = ("real", "sign", "threshold")
"""Inputs of 1-bit layers: real, their signs, or their signs beyond a learned threshold for each channel."""
OPTIONS = ("include", "exclude", "overrides", "pointwise", "activations")
"""Keys of ``convert``."""


def is_external(hparams: Mapping[str, Any]) -> bool:
    """Whether the network is not one of this package's."""
    return hparams["network"] is not None or "/" in hparams["backbone"]


def check_external(hparams: Mapping[str, Any]) -> None:
    """Require that arguments about networks from outside, or about this package's, are given to such networks only.

    Raises:
        ValueError: names the argument.
    """
    external = is_external(hparams)
    of_others = {"convert": {}, "pretrained": False, "small_images": False}
    for name, default in ({"widths": None, "dropout": 0} if external else of_others).items():
        if hparams[name] not in (default, None):
            whose = "networks of this package" if external else "networks of torchvision, timm and your own"
            network = hparams["network"] or hparams["backbone"]
            raise ValueError(f"{name} is for {whose}, not for {network}, but got {hparams[name]!r}")
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
    check_choice("convert.activations", kind, ACTIVATIONS if activation is not nn.Identity else ("real",))
    fronts = {"real": None, "sign": lambda **_: activation(), "threshold": activation}
    shape = (in_channels, *((32, 32) if hparams["small_images"] else (224, 224)))
    return converted_network(
        network, shape, None if hparams["full_precision"] else convolution, activation=fronts[kind], **options
    )


def describe_conversion(hparams: Mapping[str, Any], layers: Mapping[str, QuantizedConv2d]) -> dict[str, Any]:
    """What a packed file needs to convert the network again.

    Args:
        hparams: arguments of ``OneBitClassifier``.
        layers: the 1-bit layers by their names in ``model.net``.
    """
    kind = (hparams["convert"] or {}).get("activations", "real")
    names = (name.removeprefix("features.") for name in layers)
    return {
        "layers": {name if kind == "real" else name.removesuffix(".conv"): {} for name in names},
        "activations": kind,
        "small_images": hparams["small_images"],
        "own": hparams["network"] is not None,
    }
