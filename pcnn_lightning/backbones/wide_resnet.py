"""Wide ResNets as used by PCNN (WRN-22, WRN-40), with a shortcut around every 3×3 convolution."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from pcnn_lightning.backbones.blocks import (
    Activation,
    Convolution,
    Network,
    channel_counts,
    full_precision_stem,
    pooled,
    residual_stages,
)


def wide_resnet(
    num_classes: int,
    in_channels: int,
    convolution: Convolution,
    activation: Activation,
    *,
    widths: Sequence[int] = (16, 16, 32, 64),
    planes: int = 1,
    depth: int = 22,
    **block: Any,
) -> Network:
    """Build a wide ResNet.

    3×3 stem, three stages of (depth - 4) / 3 blocks, global average pooling and a linear classifier.

    Args:
        num_classes: number of classes.
        in_channels: number of channels of the images, which may have any size.
        convolution: factory of the 3×3 convolutions of the blocks; the stem is always full-precision.
        activation: factory of the modules that binarize their inputs.
        widths: number of feature maps of the stem and of each stage.
        planes: J, number of channels per feature map.
        depth: number of layers, including the stem, the two downsampling shortcuts and the classifier.
        block: options of the blocks; see ``OneBitBlock``.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    blocks, rest = divmod(depth - 4, 3)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 3n + 4 for a wide ResNet, but got {depth}")
    widths = channel_counts(widths, 4, planes)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=full_precision_stem(in_channels, widths[0]))
    layers |= residual_stages(widths, [blocks] * 3, convolution, activation, planes, **block)
    return pooled(layers, widths[-1], num_classes)
