"""Fast CPU inference of binary networks: blocks by XNOR and popcount, with the same logits as the frozen network.

The stem, shortcut convolutions, pools and the classifier run in torch.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from pcnn_lightning.backbones import Network, OneBitBlock
from pcnn_lightning.deploy.binary_blocks import BinaryBlocks
from pcnn_lightning.deploy.freeze import freeze
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import FrozenBatchNorm2d, FrozenConv2d, SignActivation

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)
Child = tuple[str, nn.Module | None]

PART = 32
"""Maximum number of images that pass through a network together: more would be evicted from the cache between
layers."""


def accelerate(network: AnyNetwork) -> AnyNetwork:
    """Convert a binary network, which is not changed, to a fast network for this CPU.

    The fast network has the same methods, takes any batch size and image size, and runs on as many threads as torch
    does. Its logits are those of the frozen network bit for bit. Batches of more than 32 images are split: their logits
    are those of batches of 32, from which torch's float convolutions on larger batches may differ in the last bit.

    The first pass takes some seconds to compile; later processes load the result from numba's cache.

    Args:
        network: a packed, frozen or trained network with 1-bit activations; blocks that are not binary run in torch.

    Raises:
        InputError: if numba is missing, or nothing in the network can be accelerated.
    """
    try:
        import numba  # noqa: F401  # the kernels import it only when they run
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
    """Sequential layers that process batches of any size, at most 32 images at a time."""

    def forward(self, images: Tensor) -> Tensor:
        run: Callable[[Tensor], Tensor] = super().forward
        return torch.cat([run(part) for part in torch.split(images, PART)]) if len(images) > PART else run(images)


def _replace(module: nn.Module) -> None:
    """Replace blocks within ``module``, which is not one itself, by :class:`BinaryBlocks`."""
    children, module._modules = module._modules, OrderedDict()
    for name, child in _in_rows(list(children.items()), isinstance(module, nn.Sequential)):
        module._modules[name] = child


def _in_rows(children: list[Child], sequential: bool) -> Iterator[Child]:
    """Yield the children with blocks replaced; consecutive blocks of a ``Sequential`` are merged."""
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
        and type(block.conv) is FrozenConv2d
    ):
        return False
    convolution = block.conv
    return (
        convolution.levels == 2
        and (convolution.scale is None or convolution.scale.dtype == torch.float32)
        and convolution.kernel_size == (3, 3)
        and convolution.dilation == (1, 1)
        and not isinstance(convolution.padding, str)
        and len(set(convolution.padding)) == len(set(convolution.stride)) == 1
    )


def _keeps_shape(block: OneBitBlock) -> bool:
    convolution = cast(FrozenConv2d, block.conv)
    alike = convolution.in_channels == convolution.out_channels and convolution.stride == convolution.padding == (1, 1)
    return alike and isinstance(block.shortcut, nn.Identity) and block.pool is None


def _what_is_wrong(network: nn.Module) -> str:
    modules = list(network.modules())
    layers = [module for module in modules if isinstance(module, FrozenConv2d)]
    if not layers:
        return "is of full precision"
    if not any(isinstance(module, SignActivation) for module in modules):
        return "has real activations"
    if any(layer.levels == 3 for layer in layers):
        return "is ternary"
    dtypes = [layer.scale.dtype for layer in layers if layer.scale is not None]
    return f"is of {dtypes[0]}" if torch.float32 not in dtypes and dtypes else "has other blocks"
