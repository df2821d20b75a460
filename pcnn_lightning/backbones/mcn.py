"""The two networks of MCN: a wide ResNet with two convolutions per block, and a plain network of four blocks.

Both repeat each input channel K times, once per M-Filter. All of their convolutions are 1-bit, including the first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from pcnn_lightning.backbones.blocks import Activation, Convolution, Network, channel_counts, pooled


def mcn_wide(
    num_classes: int,
    in_channels: int,
    convolution: Convolution,
    activation: Activation,
    *,
    widths: Sequence[int] = (16, 16, 32, 64),
    planes: int = 1,
    dropout: float = 0.0,
    depth: int = 20,
) -> Network:
    """Build a wide ResNet with two convolutions per block.

    Convolution, three stages of (depth - 2) / 6 blocks, BN, ReLU, global average pooling and a linear classifier.

    Args:
        num_classes: number of classes.
        in_channels: number of channels of the images, which may have any size.
        convolution: factory of all convolutions.
        activation: factory of the modules that binarize their inputs, except that of the first.
        widths: number of feature maps of the first convolution and of each of the three stages.
        planes: K, number of channels per feature map.
        dropout: dropout rate between the two convolutions of a block.
        depth: number of layers, including the first convolution and the classifier but not the shortcuts.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 6n + 2 for a wide ResNet with two convolutions a block, but got {depth}")
    widths = channel_counts(widths, 4, planes)
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
    widths: Sequence[int] = (20, 40, 80, 160),
    planes: int = 1,
    dropout: float = 0.0,
) -> Network:
    """Build a plain network of four blocks: 3×3 convolution, BN, ReLU and max pooling.

    They are followed by a linear layer with 1024 outputs, ReLU, dropout and a linear classifier. The last block pools
    globally, over 2×2 pixels for 16×16 images, so that images may have any size.

    Args:
        num_classes: number of classes.
        in_channels: number of channels of the images, which may have any size.
        convolution: factory of all convolutions.
        activation: factory of the modules that binarize their inputs, except that of the first.
        widths: number of feature maps of each of the four blocks.
        planes: K, number of channels per feature map.
        dropout: dropout rate before the classifier.

    Raises:
        ValueError: if an argument is invalid; the message names it.
    """
    widths = channel_counts(widths, 4, planes)
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
    """Repeat each channel ``planes`` times: (B, C, H, W) → (B, C * planes, H, W), in the order R, R, R, R, G, ..."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.planes = planes

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.planes, dim=-3)

    def extra_repr(self) -> str:
        return f"planes={self.planes}"


class WholeMaxPool(nn.Module):
    """Global max pooling, (B, C, H, W) → (B, C, 1, 1); ``nn.AdaptiveMaxPool2d`` is not deterministic on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(-2, -1), keepdim=True)


class TwoConvBlock(nn.Module):
    """The basic block of wide ResNets: BN → ReLU → convolution → BN → ReLU → dropout → convolution → add shortcut.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output.
        convolution: factory of both 3×3 convolutions and of the 1×1 convolution of the shortcut, which is present only
            if the shape changes.
        activation: factory of the modules that binarize their inputs, in place of ReLU.
        stride: stride of the first convolution, 1 or 2.
        planes: K, number of channels per feature map.
        dropout: dropout rate between the convolutions.
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
    """A 1×1 convolution between feature maps, with weights shared by all planes.

    It has maps_in * maps_out weights, as implied by the published parameter counts for all four sets of widths.
    """

    def __init__(self, in_channels: int, out_channels: int, convolution: Convolution, stride: int, planes: int) -> None:
        super().__init__()
        self.stride, self.planes = stride, planes
        self.conv = convolution(in_channels // planes, out_channels // planes, 1, planes=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :: self.stride, :: self.stride]
        batch, channels, height, width = x.shape
        # Channel h * K + k is plane k of feature map h. Stack the planes of each map vertically.
        maps = x.reshape(batch, channels // self.planes, self.planes * height, width)
        y: Tensor = self.conv(maps)
        return y.reshape(batch, -1, height, width)


def non_linear(activation: Activation) -> nn.Module:
    """A binarizing activation, or a ReLU while activations are real: these blocks have no other nonlinearity."""
    layer = activation()
    if isinstance(layer, nn.Identity):
        return nn.ReLU()
    layer.replaces_relu = True  # type: ignore[assignment]
    return layer
