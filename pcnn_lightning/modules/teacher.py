"""The teacher of a network in training, for distillation."""

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from pcnn_lightning.backbones.external import LIBRARIES, external_network, published_shape, users_network
from pcnn_lightning.checkpoints import load_checkpoint
from pcnn_lightning.errors import InputError, compile_failed
from pcnn_lightning.families import module_of
from pcnn_lightning.files import is_packed


class Teacher:
    """A trained network that another one learns from: frozen, and always in evaluation mode.

    It is no ``nn.Module``, so that the parameters, the checkpoints and the mode of a model that has it are without it.
    Copies of that model share it.

    Args:
        network: maps images (B, C, H, W) to logits (B, num_classes).
        num_classes: number of classes.
    """

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        self.network, self.num_classes = network.eval().requires_grad_(False), num_classes
        self._dtype, self._memory_format = torch.float32, torch.contiguous_format

    def prepare(
        self, device: torch.device | str, dtype: torch.dtype, memory_format: torch.memory_format, *, compile: bool
    ) -> None:
        """Move the network to where it is trained with, and lay it out and compile it alike."""
        self.network.to(device=device, dtype=dtype)
        self.network.to(memory_format=memory_format)
        self._dtype, self._memory_format = dtype, memory_format
        if compile:
            self.network.compile()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, C, H, W).

        Raises:
            InputError: if the network returns anything else.
        """
        try:
            logits = self.network(images.to(self._dtype, memory_format=self._memory_format))
        except TorchDynamoException as error:
            raise compile_failed(error) from error
        expected = (len(images), self.num_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise InputError(f"teacher must return logits of shape {expected}, but returns {found}")
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self


def load_teacher(name: str, num_classes: int, in_channels: int) -> Teacher:
    """Load a teacher onto the CPU, without a change of the global random state.

    Args:
        name: a checkpoint of this package, of any family; ``torchvision/resnet18``, ``timm/resnet18d`` and the like,
            with their pretrained weights; or a function that returns a trained network, such as ``my_package.build``,
            called with ``num_classes`` and ``in_channels``.
        num_classes: number of classes of the network that learns from it.
        in_channels: number of channels of its images.

    Raises:
        InputError: if it cannot be loaded, or has other classes or channels.
    """
    expected = (num_classes, in_channels)
    try:
        with isolate_rng():
            if name.partition("/")[0] in LIBRARIES:
                _check_shape(name, published_shape(name), expected)
                network = external_network(name, *expected, pretrained=True)
            elif _is_function(name) and not Path(name).exists():
                network = users_network(name, *expected)
            else:
                network = _of_checkpoint(name, expected)
    except InputError as error:
        said = re.sub(r"^(backbone|network): ", "", str(error))  # the names that the argument has elsewhere
        raise InputError(f"teacher: {said}") from error
    return Teacher(network, num_classes)


def _is_function(name: str) -> bool:
    return re.fullmatch(r"\w+(\.\w+)+", name) is not None and not name.endswith(".ckpt")


def _of_checkpoint(path: str, expected: tuple[int, int]) -> nn.Module:
    if is_packed(path):
        raise InputError(f"{path} is a packed network: name the checkpoint that it was made from")
    class_path = module_of(load_checkpoint(path)["one_bit"])
    place, _, name = str(class_path).rpartition(".")
    try:
        kind = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"the class of {path}, {class_path}, cannot be imported: {error}") from error
    try:
        model = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a class does with arguments that it does not know
        raise InputError(f"{path} cannot be loaded: {error}") from error
    _check_shape(path, (model.hparams["num_classes"], model.hparams["in_channels"]), expected)
    network: nn.Module = model.net
    return network


def _check_shape(name: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        wanted, has = (f"{classes} classes and {channels} channels" for classes, channels in (expected, found))
        raise InputError(f"it must be a network for {wanted}, but {name} is for {has}")
