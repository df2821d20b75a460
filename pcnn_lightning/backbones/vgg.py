"""VGG-small, the network without shortcuts that the 1-bit literature compares on CIFAR."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from pcnn_lightning.backbones.blocks import (
    Activation,
    Convolution,
    Network,
    OneBitBlock,
    check_stages,
    full_precision_stem,
)


def vgg_small(
    num_classes: int,
    in_channels: int,
    convolution: Convolution,
    activation: Activation,
    *,
    stages: Sequence[int] = (128, 256, 512),
    planes: int = 1,
) -> Network:
    """Two convolutions and a max-pool per stage, then a linear classifier on maps of 4×4.

    The very first convolution is full precision. Images of another size than 32×32 are pooled to 4×4 at the end.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images, whose sides may have any length.
        convolution: makes the 3×3 convolutions of the blocks.
        activation: makes what binarises their input.
        stages: maps of each stage.
        planes: J, channels per map.

    Raises:
        ValueError: names the argument that is wrong.
    """
    widths = check_stages(stages, 3, planes)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=full_precision_stem(in_channels, widths[0]))
    channels = widths[0]
    for index, width in enumerate(widths):
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        if index > 0:
            blocks["first"] = OneBitBlock(channels, width, convolution, activation)
        blocks["last"] = OneBitBlock(width, width, convolution, activation, pool=nn.MaxPool2d(2, ceil_mode=True))
        layers[f"stage{index + 1}"] = nn.Sequential(blocks)
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(4)
    layers["flatten"] = nn.Flatten()
    return Network(layers, channels * 16, num_classes)
