"""ResNet-18 and ResNet-34 with one 3×3 convolution per shortcut, as in Bi-Real Net."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from pcnn_lightning.backbones.blocks import (
    Activation,
    Convolution,
    Network,
    check_stages,
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
    stages: Sequence[int] = (64, 64, 128, 256, 512),
    planes: int = 1,
    depth: int = 18,
    stem: Literal["imagenet", "cifar"] = "imagenet",
) -> Network:
    """Stem, four stages of blocks, global average pool, linear classifier.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images, whose sides may have any length.
        convolution: makes the 3×3 convolutions of the blocks; the stem is always full precision.
        activation: makes what binarises their input.
        stages: maps of the stem and of each stage.
        planes: J, channels per map.
        depth: 18 or 34.
        stem: 7×7 of stride 2 and a max-pool (``"imagenet"``), or 3×3 (``"cifar"``).

    Raises:
        ValueError: names the argument that is wrong.
    """
    if depth not in BLOCKS:
        raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))} for a ResNet, but got {depth}")
    widths = check_stages(stages, 5, planes)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "imagenet":
        layers["stem"] = full_precision_stem(in_channels, widths[0], kernel_size=7, stride=2)
        layers["stem_pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    else:
        layers["stem"] = full_precision_stem(in_channels, widths[0])
    layers |= residual_stages(widths, BLOCKS[depth], convolution, activation, planes)
    return pooled(layers, widths[-1], num_classes)
