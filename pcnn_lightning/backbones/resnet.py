"""ResNet-18 and ResNet-34 with a shortcut around every 3×3 convolution, as in Bi-Real Net.

Liu et al., 2018, https://arxiv.org/abs/1808.00278.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

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

BLOCKS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}


def resnet(
    num_classes: int,
    in_channels: int,
    convolution: Convolution,
    activation: Activation,
    *,
    widths: Sequence[int] = (64, 64, 128, 256, 512),
    planes: int = 1,
    depth: int = 18,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    **block: Any,
) -> Network:
    """Build a ResNet: stem, four stages of blocks, global average pooling and a linear classifier.

    Args:
        num_classes: number of classes.
        in_channels: number of channels of the images, which may have any size.
        convolution: factory of the 3×3 convolutions of the blocks; the stem is always full-precision.
        activation: factory of the modules that binarize their inputs.
        widths: number of feature maps of the stem and of each stage.
        planes: J, number of channels per feature map.
        depth: 18 or 34.
        stem: 7×7 convolution with stride 2 and max pooling (``"imagenet"``), or 3×3 convolution (``"cifar"``).
        block: options of the blocks; see ``OneBitBlock``.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    if depth not in BLOCKS:
        raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))} for a ResNet, but got {depth}")
    widths = channel_counts(widths, 5, planes)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "imagenet":
        layers["stem"] = full_precision_stem(in_channels, widths[0], kernel_size=7, stride=2)
        layers["stem_pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    else:
        layers["stem"] = full_precision_stem(in_channels, widths[0])
    layers |= residual_stages(widths, BLOCKS[depth], convolution, activation, planes, **block)
    return pooled(layers, widths[-1], num_classes)
