"""Packed networks in Lightning: testing and predicting with one, and describing one that is to be made."""

import json
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from torch import nn

from pcnn_lightning.deploy import Description, PackedNetwork, load_packed
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules.classifier import OneBitClassifier
from pcnn_lightning.modules.mcn import MCN
from pcnn_lightning.modules.pcnn import PCNN

NAMES_LIMIT = 2000
"""Bytes that names of classes may take in a packed file; all else beside its numbers takes less than 1 kB."""


class PackedClassifier(OneBitClassifier):
    """A packed network, to be validated, tested and predicted with. It answers as the trained one did, bit for bit.

    What is logged has the names that it has for the trained network, but the loss of the 1-bit layers is 0: what they
    learned from is not in the file.

    Args:
        path: the packed file.

    Raises:
        InputError: if there is no such file, or it holds no packed network.
    """

    net: PackedNetwork
    trained_stages = ()

    def __init__(self, *, path: str) -> None:
        network = load_packed(path)
        description = network.description
        self.family = description.family
        super().__init__(num_classes=description.num_classes, in_channels=description.in_channels)
        self.save_hyperparameters(logger=False)  # they are of a training that this is not
        self.layer_loss = (PCNN if description.family == "PCNN" else MCN).layer_loss
        self.path, self.net = path, network
        self.set_stage(description.stage)

    @property
    def center_loss_now(self) -> None:
        return None

    def projection_parameters(self) -> list[nn.Parameter]:
        return []

    def setup(self, stage: str) -> None:
        """Look whether the data are of the kind that the network was trained on.

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
            found = getattr(data, name, value)  # data of a class of the user's own need not say
            if value != (tuple(found) if isinstance(found, list) else found):
                raise InputError(f"{self.path} was trained on data of {name} {value}, but these have {found}")


def describe(model: OneBitClassifier, data: LightningDataModule) -> Description:
    """Describe a model that was trained on ``data``, for a file to be made of it.

    Names of classes that would take more than 2 kB are left out, so that a packed file stays within 5 kB of what its
    numbers take.

    Raises:
        InputError: if the data do not say what images they have.
    """
    if isinstance(model, PackedClassifier):
        return model.net.description
    asked: dict[str, Any] = {name: getattr(data, name, None) for name in ("image_shape", "mean", "std")}
    for name, value in asked.items():
        if value is None:
            raise InputError(f"{type(data).__name__} has no {name}, which is part of a network's description")
    names = getattr(data, "classes", None)
    if len(json.dumps(json.dumps(names))) > NAMES_LIMIT:  # it will lie as JSON within JSON
        names = None
    fields: dict[str, Any] = {
        name: model.hparams[name]
        for name in ("num_classes", "in_channels", "backbone", "stages", "levels", "average")
        if name in model.hparams
    }
    return Description(
        **fields,
        family=cast(Any, model.family),
        stage=cast(Any, model.stage),
        planes=model.hparams["planes" if isinstance(model, MCN) else "projections"],
        image_size=tuple(asked["image_shape"][1:]),
        mean=asked["mean"],
        std=asked["std"],
        class_names=names,
    )
