"""What the backbones are made of."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

Convolution = Callable[..., nn.Module]
"""Makes a layer from ``(in_channels, out_channels, kernel_size, stride, padding)``: a class such as
``ProjectionConv2d`` with its own arguments bound, or an ordinary convolution without bias. A keyword ``planes`` asks
for another number of channels per map than the network's."""

Activation = Callable[[], nn.Module]
"""Makes what binarises the input of such a layer: ``SignActivation``, or ``nn.Identity`` where it stays real."""


class OneBitBlock(nn.Module):
    """BN → activation → convolution → (pool) → (add shortcut) → PReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        convolution: makes the 3×3 convolution.
        activation: makes what binarises its input.
        stride: 1 or 2.
        shortcut: what is added to the convolution's output; None adds nothing.
        pool: what follows the convolution in a network that pools by maxima.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        convolution: Convolution,
        activation: Activation,
        *,
        stride: int = 1,
        shortcut: nn.Module | None = None,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.activation = activation()
        self.conv = convolution(in_channels, out_channels, 3, stride, 1)
        self.pool = pool
        self.shortcut = shortcut
        self.prelu = nn.PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.activation(self.norm(x)))
        if self.pool is not None:
            y = self.pool(y)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        z: Tensor = self.prelu(y)
        return z


def shortcut(in_channels: int, out_channels: int, stride: int, planes: int) -> nn.Module:
    """Identity where the shape stays; otherwise full-precision 1×1 convolution → BN → (2×2 average pool).

    The 1×1 convolution has ``planes`` groups, which is what the published parameter counts of J = 4 networks imply
    (in * out / J weights). The pool rounds up, as a 3×3 convolution of stride 2 does.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, out_channels, 1, groups=planes, bias=False), norm=nn.BatchNorm2d(out_channels)
    )
    if stride > 1:
        layers["pool"] = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(layers)


def full_precision_stem(in_channels: int, width: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution → BN → PReLU, never binarised, for images (B, in_channels, H, W)."""
    conv = nn.Conv2d(in_channels, width, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(width), prelu=nn.PReLU(width)))


def residual_stages(
    widths: Sequence[int], blocks: Sequence[int], convolution: Convolution, activation: Activation, planes: int
) -> OrderedDict[str, nn.Module]:
    """Stages of residual blocks, each but the first halving the sides of its maps.

    Args:
        widths: channels that enter the first stage, then those that leave each.
        blocks: number of blocks of each stage.
        convolution: makes a 3×3 convolution.
        activation: makes what binarises its input.
        planes: groups of the shortcuts' convolutions.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    channels = widths[0]
    for index, (width, count) in enumerate(zip(widths[1:], blocks, strict=True)):
        layers = []
        for block in range(count):
            stride = 2 if index > 0 and block == 0 else 1
            skip = shortcut(channels, width, stride, planes)
            layers.append(OneBitBlock(channels, width, convolution, activation, stride=stride, shortcut=skip))
            channels = width
        stages[f"stage{index + 1}"] = nn.Sequential(*layers)
    return stages


class Network(nn.Module):
    """A backbone and its classifier.

    Args:
        features: turns images (B, in_channels, H, W) into features (B, feature_dim).
        feature_dim: length of a feature vector.
        num_classes: number of classes.
    """

    def __init__(self, features: OrderedDict[str, nn.Module], feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(features)
        self.classifier = nn.Linear(feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, in_channels, H, W)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def pooled(layers: OrderedDict[str, nn.Module], feature_dim: int, num_classes: int) -> Network:
    """A network that averages its last maps over their area."""
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    return Network(layers, feature_dim, num_classes)


def check_stages(stages: Sequence[int], count: int, planes: int) -> list[int]:
    """Channels of each kernel stage: its number of maps times ``planes``.

    Raises:
        ValueError: if there are not ``count`` stages or one is not positive.
    """
    if len(stages) != count or any(maps < 1 for maps in stages):
        raise ValueError(f"stages must be {count} positive numbers of maps for this backbone, but got {list(stages)}")
    return [maps * planes for maps in stages]
