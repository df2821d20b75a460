"""The weights of frozen layers, in the order that the C functions read them in."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pcnn_lightning.layers import FrozenConv2d, FrozenModulatedConv2d

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Words:
    """Bits (..., words, out_channels) in words of either size.

    Attributes:
        narrow: uint32.
        wide: uint64.
    """

    narrow: Array
    wide: Array


Field: TypeAlias = "int | Array | Words | dict[str, Field] | None"
"""A field of a struct in C. An array becomes a pointer to a constant, and None a null pointer."""


def array(tensor: Tensor | None) -> Array | None:
    """The numbers of a tensor in float32."""
    return None if tensor is None else tensor.detach().float().contiguous().numpy()


def sign_weights(layer: FrozenConv2d, falls: Tensor) -> Words:
    """Kernels for ``convolve_signs.c``, (planes, kernel, kernel, words, out_channels).

    Ternary kernels are the mean of two binary ones, which differ where the ternary one is 0.

    Args:
        layer: an ordinary frozen layer of two or three levels.
        falls: (in_channels,), whether the bits of the input are inverted signs; the bits of the kernels then are, too.
    """
    assert layer.signs is not None
    planes = [layer.signs > -1, layer.signs > 0] if layer.levels == 3 else [layer.signs > 0]
    bits = (torch.stack(planes) ^ falls[:, None, None]).permute(0, 3, 4, 1, 2).numpy()
    return Words(_pack(bits, 32), _pack(bits, 64))


def number_weights(layer: nn.Conv2d | FrozenConv2d) -> dict[str, Field]:
    """Kernels for ``convolve.c``: floats, or codes of one or two bits and what they stand for."""
    fields: dict[str, Field] = {"groups": layer.groups, "planes": 1}
    if isinstance(layer, nn.Conv2d):
        return fields | {"weights": array(_by_tap(layer.weight, layer.groups))}
    codes, values = layer.signs, array(torch.tensor(layer.symbols))
    if type(layer) is FrozenModulatedConv2d:
        modulation = layer.modulation if layer.scale is None else layer.modulation * layer.scale
        taps = modulation.expand(-1, *layer.kernel_size).permute(1, 2, 0)
        fields |= {"planes": layer.planes, "modulation": array(taps)}
        if layer.kernels is not None:
            return fields | {"weights": array(_by_tap(layer.kernels, layer.groups))}
        if layer.codes is not None:
            codes, values = layer.codes, array(layer.values)
    assert codes is not None
    width = 1 if len(layer.symbols) == 2 else 2
    places = (_by_tap(codes, layer.groups).numpy() - layer.symbols.start) // layer.symbols.step
    bits = places[..., None] >> np.arange(width) & 1  # the lowest bit of each code first
    rows = np.packbits(bits.reshape(*bits.shape[:-2], -1).astype(bool), axis=-1, bitorder="little")
    return fields | {"codes": rows, "bits": width, "values": values}


def linear_weights(layer: nn.Linear, shape: tuple[int, int, int]) -> dict[str, Field]:
    """Weights for ``convolve.c``, which takes the features as one pixel.

    Args:
        layer: a layer behind an image, which torch flattens in the order (C, H, W), and C in the order (H, W, C).
        shape: (C, H, W) of the image.
    """
    rows = layer.weight.reshape(-1, *shape).permute(2, 3, 1, 0)
    return {"groups": 1, "planes": 1, "weights": array(rows.flatten(0, 2))}


def _by_tap(kernels: Tensor, groups: int) -> Tensor:
    """(maps, in_channels / groups, kh, kw) → (groups, kh, kw, in_channels / groups, maps / groups)."""
    return kernels.reshape(groups, -1, *kernels.shape[1:]).permute(0, 3, 4, 2, 1)


def _pack(bits: Array, size: int) -> Array:
    """(..., out_channels, in_channels) → (..., words, out_channels)."""
    fill = [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % size)]
    octets = np.packbits(np.pad(bits, fill), axis=-1, bitorder="little")
    return np.ascontiguousarray(octets.view(f"<u{size // 8}").swapaxes(-1, -2))
