"""The convolutions and linear layers of a network, in the order in which an image passes through them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
        names: all of its paths.
        calls: how often an image passes through it.
        macs: multiply-accumulates for one image.
        is_pooled: whether its input has one pixel, as in squeeze-and-excitation.
    """

    name: str
    module: Layer
    names: tuple[str, ...] = ()
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
    layers: dict[nn.Module, Traced] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, Layer):
            traced = layers.setdefault(module, Traced(name, module))
            traced.names += (name,)
    called: dict[nn.Module, Traced] = {}

    def count(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        traced = layers[module]
        traced.calls += 1
        traced.is_pooled = _has_one_pixel(given, named)
        traced.macs += output[0].numel() * traced.module.weight[0].numel()
        called[module] = traced

    pass_image(network, image_shape, list(layers), count)
    return [*called.values(), *(traced for module, traced in layers.items() if module not in called)]


def recheck_pooled(network: nn.Module, image_shape: tuple[int, int, int], layers: Sequence[Traced]) -> None:
    """Keep :attr:`Traced.is_pooled` only where the input has one pixel for an image of twice the size as well.

    Other features have one pixel because the image is small. Networks that take images of one size only are left as
    they are.
    """
    pooled: dict[nn.Module, Traced] = {one.module: one for one in layers if one.is_pooled}

    def compare(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], _: Tensor) -> None:
        pooled[module].is_pooled = _has_one_pixel(given, named)

    channels, height, width = image_shape
    if pooled:
        with suppress(InputError):
            pass_image(network, (channels, 2 * height, 2 * width), list(pooled), compare)


def pass_image(
    network: nn.Module, image_shape: tuple[int, int, int], modules: Sequence[nn.Module], hook: Callable[..., None]
) -> None:
    """Pass an image of zeros through ``network``, and call ``hook`` after each of ``modules``.

    Args:
        network: the network.
        image_shape: (C, H, W).
        modules: modules of the network.
        hook: called with the module, its inputs, its inputs by keyword, and its output.

    Raises:
        InputError: if the network cannot process such an image.
    """
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    like = next(network.parameters(), torch.zeros(()))
    try:
        evaluate(network, torch.zeros(1, *image_shape, dtype=like.dtype, device=like.device))
    except Exception as error:  # whatever a forward method does with images of another size
        raise InputError(f"an image of shape {image_shape} cannot pass through the network: {error}") from error
    finally:
        for handle in handles:
            handle.remove()


def _has_one_pixel(given: tuple[Tensor, ...], named: dict[str, Tensor]) -> bool:
    return (*given, *named.values())[0].shape[2:].numel() == 1


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
