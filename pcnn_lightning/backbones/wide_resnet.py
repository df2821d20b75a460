"""WRN-22 and WRN-40 as PCNN uses them: one 3×3 convolution per shortcut."""

from collections import OrderedDict
from collections.abc import Sequence

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


def wide_resnet(
    num_classes: int,
    in_channels: int,
    convolution: Convolution,
    activation: Activation,
    *,
    stages: Sequence[int] = (16, 16, 32, 64),
    planes: int = 1,
    depth: int = 22,
) -> Network:
    """3×3 stem, three stages of (depth - 4) / 3 blocks, global average pool, linear classifier.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images, whose sides may have any length.
        convolution: makes the 3×3 convolutions of the blocks; the stem is always full precision.
        activation: makes what binarises their input.
        stages: maps of the stem and of each stage.
        planes: J, channels per map.
        depth: layers, counted with stem, the two down-sampling shortcuts and classifier.

    Raises:
        ValueError: names the argument that is wrong.
    """
    blocks, rest = divmod(depth - 4, 3)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 3n + 4 for a wide ResNet, but got {depth}")
    widths = check_stages(stages, 4, planes)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=full_precision_stem(in_channels, widths[0]))
    layers |= residual_stages(widths, [blocks] * 3, convolution, activation, planes)
    return pooled(layers, widths[-1], num_classes)
