"""Packed networks in Lightning: testing and predicting with one, and describing a network to be packed."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from pcnn_lightning.backbones.blocks import Network
from pcnn_lightning.deploy import Description, PackedNetwork, compile_openvino, load_packed
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import QuantizedConv2d
from pcnn_lightning.modules.classifier import OneBitClassifier
from pcnn_lightning.modules.conversion import is_external
from pcnn_lightning.modules.optimization import GroupSettings
from pcnn_lightning.stages import Stage

NAMES_LIMIT = 2000
"""Bytes that class names may take in a packed file; the rest of its header takes less than 1 kB."""


class PackedClassifier(OneBitClassifier):
    """A packed network to validate, test and predict with. Its logits equal the trained network's bit for bit.

    It logs the same names as the trained network, apart from the quantization loss: the latent weights from which
    that is computed are not in the file.

    Args:
        path: the packed file.

    Raises:
        InputError: if there is no such file, or it holds no packed network.
    """

    net: PackedNetwork

    def __init__(self, *, path: str) -> None:
        network = load_packed(path)
        description = network.description
        super().__init__(num_classes=description.num_classes, in_channels=description.in_channels)
        self.save_hyperparameters(logger=False)  # the other hyperparameters belong to a training that is not its own
        self.family, self.planes = description.family, description.planes
        self.path, self.net = path, network
        if description.stage != "full_precision":
            self.take_stage(description.stage, Stage(cast(Any, description.stage)))

    def group_settings(self, settings: Mapping[str, Any]) -> dict[str, GroupSettings]:
        """None, since it is not trained."""
        return {}

    def setup(self, stage: str) -> None:
        """Check that the data are of the kind that the network was trained on.

        Raises:
            InputError: if they are not, or the network is to be trained.
        """
        if stage == "fit":
            raise InputError(f"{self.path} is a packed network: it cannot be trained")
        description = self.net.description
        expected = {
            "num_classes": description.num_classes,
            "image_shape": (description.in_channels, *description.image_size),
            "mean": description.mean,
            "std": description.std,
        }
        if description.class_names is not None:
            expected["classes"] = description.class_names
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for name, value in expected.items():
            found = getattr(data, name, value)  # a data module from outside this package need not say
            if value != (tuple(found) if isinstance(found, list) else found):
                raise InputError(f"{self.path} was trained on data of {name} {value}, but these have {found}")


def in_openvino(model: OneBitClassifier, data: LightningDataModule) -> OneBitClassifier:
    """The network of ``model``, trained on ``data``, frozen and computed by OpenVINO, to test and predict with.

    Raises:
        InputError: if the data do not say what images they have, a layer has no translation, or OpenVINO is not
            installed.
    """
    frozen = PackedNetwork.of(model.net, describe(model, data))
    description, stage_name = frozen.description, model.stage_name
    if not isinstance(model, PackedClassifier):  # without the quantization loss, which needs latent weights
        model = OneBitClassifier(num_classes=description.num_classes, in_channels=description.in_channels)
        model.family = description.family
    network = Network(OrderedDict(openvino=_InOpenVINO(frozen)), description.num_classes, description.num_classes)
    network.classifier = nn.Identity()  # type: ignore[assignment]  # the features are logits
    model.net = PackedNetwork(network, description)
    if description.stage != "full_precision":
        model.take_stage(stage_name, Stage(cast(Any, description.stage)))
    return model


class _InOpenVINO(nn.Module):
    """Maps normalized images (B, C, H, W) to logits (B, num_classes)."""

    def __init__(self, network: PackedNetwork) -> None:
        super().__init__()
        self.classifier = compile_openvino(network)
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(network, name))

    def forward(self, images: Tensor) -> Tensor:
        raw = (images.float() * self.std + self.mean).round().to(torch.uint8)  # type: ignore[operator]
        return self.classifier.logits(raw).to(images.device)


def describe(model: OneBitClassifier, data: LightningDataModule) -> Description:
    """Describe a model that was trained on ``data``, for a packed or exported file.

    Class names that would take more than 2 kB are left out, so that a packed file stays within 5 kB of the size of its
    numbers.

    Raises:
        InputError: if the data do not say what images they have, not all layers have entered the model's stage, or
            its kernels are not of 1 bit.
    """
    if isinstance(model, PackedClassifier):
        return model.net.description
    if not model.has_entered:
        raise InputError(f"only some of the layers have entered stage {model.stage}: train on until all of them have")
    asked: dict[str, Any] = {name: getattr(data, name, None) for name in ("image_shape", "mean", "std")}
    for name, value in asked.items():
        if value is None:
            raise InputError(f"{type(data).__name__} has no {name}, which is part of a network's description")
    names = getattr(data, "classes", None)
    if len(json.dumps(json.dumps(names))) > NAMES_LIMIT:  # packed files hold JSON within JSON
        names = None
    try:
        options = _layer_options(list(model.one_bit_layers.values()))
    except ValueError as error:
        raise InputError(str(error)) from error
    return Description(
        family=model.family,
        stage=model.stage,
        backbone=model.hparams["backbone"],
        num_classes=model.hparams["num_classes"],
        in_channels=model.hparams["in_channels"],
        image_size=tuple(asked["image_shape"][1:]),
        mean=asked["mean"],
        std=asked["std"],
        widths=model.hparams["widths"],
        planes=model.planes,
        sign_activations=any(activation.enabled for activation in model.sign_activations),
        layer=options,
        class_names=names,
        conversion=_conversion(model, options) if is_external(model.hparams) else None,
        block=model.block,
    )


def _layer_options(layers: list[QuantizedConv2d]) -> dict[str, Any]:
    """The options of all frozen layers; groups and biases that only some of them have come from the backbone."""
    if not layers:
        return {}
    shared = set.intersection(*(set(layer.groups_and_bias.items()) for layer in layers))
    return layers[0].frozen().options | dict(sorted(shared))


def _conversion(model: OneBitClassifier, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What a packed file needs to convert the network again; ``shared`` are the options of all its 1-bit layers."""
    asked, signs = (model.hparams["convert"] or {}).get("activations", "real"), model.sign_activations
    kind = "real" if asked == "real" or not signs else asked if signs[0].enabled else "off"
    converted = {one.name for one in model.conversion.converted} if model.conversion is not None else set()
    layers = {}
    for name, layer in model.one_bit_layers.items():
        options = {"planes": layer.planes, **layer.frozen().options}
        original = name.removeprefix("features.")
        original = original if kind == "real" else original.removesuffix(".conv")
        if original not in converted:
            raise InputError(f"{original} was a 1-bit layer before the conversion, and cannot be described")
        layers[original] = {
            option: value
            for option, value in options.items()
            if value != {"planes": model.planes, **shared}.get(option)
        }
    small_images, own = model.hparams["small_images"], model.hparams["network"]
    return {"layers": layers, "activations": kind, "small_images": small_images, "own": own}
