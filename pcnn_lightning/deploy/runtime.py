"""Binary PCNN networks made fast on a CPU: blocks by XNOR and popcount, with the very logits of the frozen network.

What is not a block stays torch's own: the stem, the shortcuts' convolutions, pools and the classifier.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from pcnn_lightning.backbones import Network, OneBitBlock
from pcnn_lightning.deploy.binary_blocks import BinaryBlocks
from pcnn_lightning.deploy.freeze import freeze
from pcnn_lightning.deploy.layers import FrozenBatchNorm2d, FrozenModulatedConv2d, FrozenProjectionConv2d
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import SignActivation

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)
Child = tuple[str, nn.Module | None]

PART = 32
"""Images that go through a network together: more would leave the cache between any two of its layers."""


def accelerate(network: AnyNetwork) -> AnyNetwork:
    """Make a fast network for this CPU of a binary PCNN, which stays as it is.

    The fast one has the same methods, takes any batch size and image size, and runs on as many threads as torch does.
    Its logits are those of the frozen network bit for bit. Larger batches than of 32 images are taken apart: then, what
    torch's float convolutions make of 32 images counts, which is not to the last bit what they make of more.

    The first pass compiles for some seconds; later processes find the result in numba's cache.

    Args:
        network: a PCNN in its binary stage: packed, frozen or trained. Blocks that are not binary stay as they are.

    Raises:
        InputError: if numba is missing, or nothing in the network can be accelerated.
    """
    try:
        import numba  # noqa: F401  # the kernels ask for it only when they run
    except ImportError as error:
        raise InputError(f"the fast runtime needs numba ({error}): pip install '.[runtime]'") from error
    fast = freeze(network)
    _replace(fast)
    if not any(isinstance(module, BinaryBlocks) for module in fast.modules()):
        raise InputError(
            "only blocks of sign activations and binary 3×3 convolutions in float32 can be accelerated, "
            f"but this network {_what_is_wrong(fast)}: run it in torch"
        )
    if isinstance(fast, Network):
        fast.features = InParts(OrderedDict(fast.features.named_children()))
    return cast(AnyNetwork, fast)


class InParts(nn.Sequential):
    """Layers in sequence for batches of any size, at most 32 images at a time."""

    def forward(self, images: Tensor) -> Tensor:
        run: Callable[[Tensor], Tensor] = super().forward
        return torch.cat([run(part) for part in torch.split(images, PART)]) if len(images) > PART else run(images)


def _replace(module: nn.Module) -> None:
    """Put :class:`BinaryBlocks` in the place of blocks within ``module``, which is not itself one."""
    children, module._modules = module._modules, OrderedDict()
    for name, child in _in_rows(list(children.items()), isinstance(module, nn.Sequential)):
        module._modules[name] = child


def _in_rows(children: list[Child], sequential: bool) -> Iterator[Child]:
    """The children, with blocks replaced: those that follow each other in a ``Sequential`` together."""
    row: list[OneBitBlock] = []
    row_name = ""
    for name, child in children:
        fit = child is not None and _is_fit(child)
        if row and not (sequential and fit and all(map(_keeps_shape, (row[-1], cast(OneBitBlock, child))))):
            yield row_name, BinaryBlocks(row)
            row = []
        if fit:
            row_name = row_name if row else name
            row.append(cast(OneBitBlock, child))
        else:
            if child is not None:
                _replace(child)
            yield name, child
    if row:
        yield row_name, BinaryBlocks(row)


def _is_fit(block: nn.Module) -> bool:
    if not (
        isinstance(block, OneBitBlock)
        and isinstance(block.norm, FrozenBatchNorm2d)
        and isinstance(block.activation, SignActivation)
        and isinstance(block.conv, FrozenProjectionConv2d)
    ):
        return False
    convolution = block.conv
    return (
        convolution.levels == "binary"
        and convolution.scale.dtype == torch.float32
        and convolution.kernel_size == (3, 3)
        and convolution.dilation == (1, 1)
        and not isinstance(convolution.padding, str)
        and len(set(convolution.padding)) == len(set(convolution.stride)) == 1
    )


def _keeps_shape(block: OneBitBlock) -> bool:
    convolution = cast(FrozenProjectionConv2d, block.conv)
    alike = convolution.in_channels == convolution.out_channels and convolution.stride == convolution.padding == (1, 1)
    return alike and isinstance(block.shortcut, nn.Identity) and block.pool is None


def _what_is_wrong(network: nn.Module) -> str:
    modules = list(network.modules())
    layers = [module for module in modules if isinstance(module, FrozenProjectionConv2d)]
    if any(isinstance(module, FrozenModulatedConv2d) for module in modules):
        return "is an MCN, whose activations are real numbers"
    if not layers:
        return "is of full precision"
    if any(layer.levels == "ternary" for layer in layers):
        return "is ternary"
    if any(layer.scale.dtype != torch.float32 for layer in layers):
        return f"is of {layers[0].scale.dtype}"
    return "has other blocks"
