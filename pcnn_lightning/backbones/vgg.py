"""VGG-small, the network without shortcuts that is the common CIFAR baseline in the 1-bit literature."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from pcnn_lightning.backbones.blocks import (
    Activation,
    Convolution,
    Network,
    OneBitBlock,
    channel_counts,
    full_precision_stem,
)


def vgg_small(
    num_classes: int,
    in_channels: int,
    convolution: Convolution,
    activation: Activation,
    *,
    widths: Sequence[int] = (128, 256, 512),
    planes: int = 1,
    **block: Any,
) -> Network:
    """Build VGG-small: two convolutions and max pooling per stage, then a linear classifier on 4×4 feature maps.

    The first convolution is full-precision. Feature maps of images that are not 32×32 are pooled to 4×4 at the end.

    Args:
        num_classes: number of classes.
        in_channels: number of channels of the images, which may have any size.
        convolution: factory of the 3×3 convolutions of the blocks.
        activation: factory of the modules that binarize their inputs.
        widths: number of feature maps of each stage; the stem has as many as the first.
        planes: J, number of channels per feature map.
        block: options of the blocks; see ``OneBitBlock``.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    widths = channel_counts(widths, 3, planes)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=full_precision_stem(in_channels, widths[0]))
    channels = widths[0]
    for index, width in enumerate(widths):
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        stage, pool = f"stage{index + 1}", nn.MaxPool2d(2, ceil_mode=True)
        if index > 0:
            blocks["first"] = OneBitBlock(channels, width, convolution, activation, name=f"{stage}.first", **block)
        blocks["last"] = OneBitBlock(width, width, convolution, activation, pool=pool, name=f"{stage}.last", **block)
        layers[stage] = nn.Sequential(blocks)
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(4)
    layers["flatten"] = nn.Flatten()
    return Network(layers, channels * 16, num_classes)
