"""The convolutions and linear layers of a network, in the order in which an image passes through them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pcnn_lightning.errors import InputError

Layer = nn.modules.conv._ConvNd | nn.Linear


@dataclass
class Traced:
    """A layer of a network.

    Attributes:
        name: its path in the network; the first one if it has several.
        module: the layer.
        calls: how often an image passes through it.
        macs: multiply-accumulates for one image.
        is_pooled: whether its input has one pixel, as in squeeze-and-excitation.
    """

    name: str
    module: Layer
    calls: int = 0
    macs: int = 0
    is_pooled: bool = False


def trace(network: nn.Module, image_shape: tuple[int, int, int]) -> list[Traced]:
    """Pass an image of zeros through ``network``, and return its layers in the order of their first calls.

    Layers that no image passes through, such as auxiliary classifiers, come last. The network is not changed.

    Args:
        network: the network.
        image_shape: (C, H, W).

    Raises:
        InputError: if the network cannot process such an image.
    """
    layers = {module: Traced(name, module) for name, module in network.named_modules() if isinstance(module, Layer)}
    called: dict[nn.Module, Traced] = {}

    def count(traced: Traced, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        traced.calls += 1
        traced.is_pooled = inputs[0].shape[2:].numel() == 1
        traced.macs += output[0].numel() * traced.module.weight[0].numel()
        called[traced.module] = traced

    handles = [module.register_forward_hook(partial(count, traced)) for module, traced in layers.items()]
    like = next(network.parameters(), torch.zeros(()))
    try:
        evaluate(network, torch.zeros(1, *image_shape, dtype=like.dtype, device=like.device))
    except Exception as error:  # whatever a forward method does with images of another size
        raise InputError(f"an image of shape {image_shape} cannot pass through the network: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return [*called.values(), *(traced for module, traced in layers.items() if module not in called)]


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor) -> Any:
    """The output of ``network`` in evaluation mode, after which each module is in the mode that it was in."""
    before = {module: module.training for module in network.modules()}
    network.eval()
    try:
        return network(images)
    finally:
        for module, mode in before.items():
            module.training = mode
