"""Building blocks of the backbones."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from pcnn_lightning.layers import TwoSlopePReLU

Convolution = Callable[..., nn.Module]
"""Factory that builds a layer from ``(in_channels, out_channels, kernel_size, stride, padding)``: a class such as
``ProjectionConv2d`` with its other arguments bound, or an ordinary convolution without bias. The keyword ``planes``
overrides the network's number of channels per feature map; ``groups`` and ``bias`` are those of the layer."""

Activation = Callable[..., nn.Module]
"""Factory of the module that binarizes the input of such a layer: ``SignActivation``, or ``nn.Identity`` for
real-valued activations. The keyword ``threshold`` is the number of channels with a learned threshold."""

BLOCK_OPTIONS = ("activation_threshold", "two_slopes")
"""Options of :class:`OneBitBlock`, all of them off by default."""


class OneBitBlock(nn.Module):
    """BN → activation → convolution → (pool) → (add shortcut) → PReLU.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output.
        convolution: factory of the 3×3 convolution.
        activation: factory of the module that binarizes its input.
        stride: 1 or 2.
        shortcut: module whose output is added to that of the convolution; None for no shortcut.
        pool: pooling layer after the convolution, in networks that use max pooling; None for no pooling.
        activation_threshold: whether each channel has a learned threshold in front of its sign, as in ReActNet (Liu et
            al., ECCV 2020, https://arxiv.org/abs/2003.03488).
        two_slopes: whether the PReLU has two learned slopes, as the Maxout of AdaBin (Tu et al., ECCV 2022,
            https://arxiv.org/abs/2208.08084).
        name: what errors call the block.
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
        activation_threshold: bool = False,
        two_slopes: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        if activation_threshold:
            self.activation = activation(threshold=in_channels, name=f"{name}.activation")
        else:
            self.activation = activation()
        self.conv = convolution(in_channels, out_channels, 3, stride, 1)
        self.pool = pool
        self.shortcut = shortcut
        self.prelu = TwoSlopePReLU(out_channels) if two_slopes else nn.PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.activation(self.norm(x)))
        if self.pool is not None:
            y = self.pool(y)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        z: Tensor = self.prelu(y)
        return z


def shortcut(in_channels: int, out_channels: int, stride: int, planes: int) -> nn.Module:
    """Build a shortcut: the identity if the shape is unchanged, else full-precision 1×1 conv → BN → (2×2 average pool).

    The 1×1 convolution has ``planes`` groups, as implied by the published parameter counts of the networks with J = 4
    (in * out / J weights). The pool rounds odd sizes up, as does a 3×3 convolution with stride 2.
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
    """Build convolution → BN → PReLU in full precision, for images (B, in_channels, H, W)."""
    conv = nn.Conv2d(in_channels, width, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(width), prelu=nn.PReLU(width)))


def residual_stages(
    widths: Sequence[int],
    blocks: Sequence[int],
    convolution: Convolution,
    activation: Activation,
    planes: int,
    **block: Any,
) -> OrderedDict[str, nn.Module]:
    """Build stages of residual blocks, each of which, except the first, halves the height and width.

    Args:
        widths: number of input channels of the first stage, followed by the number of output channels of each stage.
        blocks: number of blocks of each stage.
        convolution: factory of the 3×3 convolutions.
        activation: factory of the modules that binarize their inputs.
        planes: number of groups of the convolutions in the shortcuts.
        block: options of the blocks, of :data:`BLOCK_OPTIONS`.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    channels = widths[0]
    for index, (width, count) in enumerate(zip(widths[1:], blocks, strict=True)):
        layers = []
        for place in range(count):
            stride = 2 if index > 0 and place == 0 else 1
            skip = shortcut(channels, width, stride, planes)
            name = f"stage{index + 1}.{place}"
            layers.append(
                OneBitBlock(channels, width, convolution, activation, stride=stride, shortcut=skip, name=name, **block)
            )
            channels = width
        stages[f"stage{index + 1}"] = nn.Sequential(*layers)
    return stages


class _Features(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        """A method of ours, since torch 2.11 would compile each layer of an ordinary ``Sequential`` on its own."""
        return cast(Tensor, super().forward(images))  # type: ignore[no-untyped-call]


class Network(nn.Module):
    """A backbone followed by a linear classifier.

    Args:
        features: layers that map images (B, in_channels, H, W) to features (B, feature_dim).
        feature_dim: size of the feature vectors.
        num_classes: number of classes.
    """

    def __init__(self, features: OrderedDict[str, nn.Module], feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.features: nn.Sequential = _Features(features)
        self.classifier = nn.Linear(feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (B, num_classes) of ``images`` (B, in_channels, H, W)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def pooled(layers: OrderedDict[str, nn.Module], feature_dim: int, num_classes: int) -> Network:
    """Build a network with global average pooling after ``layers``."""
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    return Network(layers, feature_dim, num_classes)


def channel_counts(widths: Sequence[int], count: int, planes: int) -> list[int]:
    """Return the number of channels for each of ``widths``, ``planes`` per feature map.

    Raises:
        ValueError: if the number of widths is not ``count``, or one is not positive.
    """
    if len(widths) != count or any(not isinstance(maps, int) or maps < 1 for maps in widths):
        raise ValueError(
            f"widths must be {count} positive whole numbers of feature maps for this backbone, but got {list(widths)}"
        )
    return [maps * planes for maps in widths]
