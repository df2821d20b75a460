"""The two networks of MCN: a wide ResNet with two convolutions a block, and four plain blocks.

Both repeat each colour plane for every M-Filter, and all of their convolutions are 1-bit, the first one included.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from pcnn_lightning.backbones.blocks import Activation, Convolution, Network, check_stages, pooled


def mcn_wide(
    num_classes: int,
    in_channels: int,
    convolution: Convolution,
    activation: Activation,
    *,
    stages: Sequence[int] = (16, 16, 32, 64),
    planes: int = 1,
    dropout: float = 0.0,
    depth: int = 20,
) -> Network:
    """Convolution, three stages of (depth - 2) / 6 blocks, BN, ReLU, global average pool, linear classifier.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images, whose sides may have any length.
        convolution: makes every convolution.
        activation: makes what binarises their input, except that of the first.
        stages: maps of the first convolution and of the three stages.
        planes: K, channels per map.
        dropout: rate of it between the two convolutions of a block.
        depth: layers, counted with the first convolution and the classifier, without shortcuts.

    Raises:
        ValueError: names the argument that is wrong.
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 6n + 2 for a wide ResNet with two convolutions a block, but got {depth}")
    widths = check_stages(stages, 4, planes)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        expand=RepeatChannels(planes), stem=convolution(in_channels * planes, widths[0], 3, 1, 1)
    )
    channels = widths[0]
    for index, width in enumerate(widths[1:]):
        stage = []
        for block in range(blocks):
            stride = 2 if index > 0 and block == 0 else 1
            stage.append(TwoConvBlock(channels, width, convolution, activation, stride, planes, dropout))
            channels = width
        layers[f"stage{index + 1}"] = nn.Sequential(*stage)
    layers["norm"], layers["relu"] = nn.BatchNorm2d(channels), nn.ReLU()
    return pooled(layers, channels, num_classes)


def mcn_small(
    num_classes: int,
    in_channels: int,
    convolution: Convolution,
    activation: Activation,
    *,
    stages: Sequence[int] = (20, 40, 80, 160),
    planes: int = 1,
    dropout: float = 0.0,
) -> Network:
    """Four blocks of 3×3 convolution, BN, ReLU and max-pool, then linear to 1024, ReLU, dropout and classifier.

    The pool of the last block takes its whole map, so that images of any size fit: 2×2 for 16×16 images.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images, whose sides may have any length.
        convolution: makes every convolution.
        activation: makes what binarises their input, except that of the first.
        stages: maps of the four blocks.
        planes: K, channels per map.
        dropout: rate of it before the classifier.

    Raises:
        ValueError: names the argument that is wrong.
    """
    widths = check_stages(stages, 4, planes)
    layers: OrderedDict[str, nn.Module] = OrderedDict(expand=RepeatChannels(planes))
    channels = in_channels * planes
    for index, width in enumerate(widths):
        block: OrderedDict[str, nn.Module] = OrderedDict(conv=convolution(channels, width, 3, 1, 1))
        block["norm"], last = nn.BatchNorm2d(width), index == 3
        block["activation"] = nn.ReLU() if last else non_linear(activation)
        block["pool"] = WholeMaxPool() if last else nn.MaxPool2d(2, ceil_mode=True)
        layers[f"stage{index + 1}"] = nn.Sequential(block)
        channels = width
    layers["flatten"] = nn.Flatten()
    layers["hidden"], layers["relu"], layers["dropout"] = nn.Linear(channels, 1024), nn.ReLU(), nn.Dropout(dropout)
    return Network(layers, 1024, num_classes)


class RepeatChannels(nn.Module):
    """Each channel ``planes`` times, side by side: (B, C, H, W) → (B, C * planes, H, W) as R, R, R, R, G, ..."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.planes = planes

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.planes, dim=-3)

    def extra_repr(self) -> str:
        return f"planes={self.planes}"


class WholeMaxPool(nn.Module):
    """The largest value of each map, (B, C, H, W) → (B, C, 1, 1); torch's own has no deterministic gradient on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(-2, -1), keepdim=True)


class TwoConvBlock(nn.Module):
    """BN → ReLU → convolution → BN → ReLU → dropout → convolution → add shortcut, the wide ResNet's basic block.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        convolution: makes both 3×3 convolutions and the shortcut's 1×1, which there is where the shape changes.
        activation: makes what binarises their input, in place of ReLU.
        stride: 1 or 2, of the first convolution.
        planes: K, channels per map.
        dropout: rate of it between the convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        convolution: Convolution,
        activation: Activation,
        stride: int,
        planes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm1, self.activation1 = nn.BatchNorm2d(in_channels), non_linear(activation)
        self.conv1 = convolution(in_channels, out_channels, 3, stride, 1)
        self.norm2, self.activation2 = nn.BatchNorm2d(out_channels), non_linear(activation)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(out_channels, out_channels, 3, 1, 1)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut = PlaneConv(in_channels, out_channels, convolution, stride, planes) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(self.norm1(x))
        skipped = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(self.activation2(self.norm2(self.conv1(y))))
        z: Tensor = self.conv2(y) + skipped
        return z


class PlaneConv(nn.Module):
    """A 1×1 convolution from map to map, the same on each plane.

    It has maps_in * maps_out weights, which is what the published parameter counts of all four sets of stages imply.
    """

    def __init__(self, in_channels: int, out_channels: int, convolution: Convolution, stride: int, planes: int) -> None:
        super().__init__()
        self.stride, self.planes = stride, planes
        self.conv = convolution(in_channels // planes, out_channels // planes, 1, planes=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :: self.stride, :: self.stride]
        batch, channels, height, width = x.shape
        # Channel h * K + k is plane k of map h: the planes of a map lie one below another.
        maps = x.reshape(batch, channels // self.planes, self.planes * height, width)
        y: Tensor = self.conv(maps)
        return y.reshape(batch, -1, height, width)


def non_linear(activation: Activation) -> nn.Module:
    """What binarises, or ReLU where activations stay real: nothing else in these blocks bends."""
    layer = activation()
    return nn.ReLU() if isinstance(layer, nn.Identity) else layer
