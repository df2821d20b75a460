"""Layers of frozen networks: no parameters, only buffers, and attributes that another runtime can read."""

from abc import abstractmethod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcnn_lightning.functional import Levels, modulate
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, QuantizedConv2d
from pcnn_lightning.layers.checks import check_choice, pair_of

Padding = tuple[int, int] | Literal["valid", "same"]


class FrozenConv2d(nn.Module):
    """A convolution, without bias and groups, whose kernels are made of few numbers and nothing that is learned.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: an integer or a pair.
        stride: an integer or a pair.
        padding: an integer, a pair, ``"valid"`` or ``"same"``. What is padded with is 0, also where inputs are signs.
        dilation: an integer or a pair.

    Attributes:
        symbols: what elements of the layer's int8 buffer may be, if it has one, in the order of their packed codes.
        kernel_size: a pair, as are ``stride``, ``dilation`` and ``padding`` (but ``"valid"`` and ``"same"``).
    """

    symbols: range

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | Padding = 0,
        dilation: int | tuple[int, int] = 1,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = pair_of("kernel_size", kernel_size, 1), pair_of("stride", stride, 1)
        self.padding: Padding = padding if isinstance(padding, str) else pair_of("padding", padding, 0)
        self.dilation = pair_of("dilation", dilation, 1)

    @abstractmethod
    def quantized_weight(self) -> Tensor:
        """The kernels as they convolve, (out_channels, in_channels, kh, kw)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.quantized_weight(), None, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}"
        )


class FrozenProjectionConv2d(FrozenConv2d):
    """What is left of a :class:`~pcnn_lightning.layers.ProjectionConv2d`: ``conv2d(x, D)``, D = signs * scale.

    It sums signs and multiplies by the scale once, as the trained layer does in evaluation mode. Sums of signs are
    whole numbers and exact in any order: whatever sums them, by convolution or by popcount, gets the same bits.

    Args:
        levels: ``"binary"`` for signs in {-1, 1}, ``"ternary"`` for {-1, 0, 1}.

    All other arguments and attributes are those of :class:`FrozenConv2d`.

    Attributes:
        signs: of D, (out_channels, in_channels, kh, kw) int8.
        scale: a or Δ, a scalar.
    """

    signs: Tensor
    scale: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | Padding = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        levels: Levels = "binary",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation)
        check_choice("levels", levels, get_args(Levels))
        self.levels = levels
        self.symbols = range(-1, 2, 2) if levels == "binary" else range(-1, 2)
        self.register_buffer("signs", torch.ones(out_channels, in_channels, *self.kernel_size, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def of(cls, layer: ProjectionConv2d) -> "FrozenProjectionConv2d":
        """Freeze ``layer`` as it is now.

        Raises:
            ValueError: if a number in it is not finite.
        """
        _check_finite(layer)
        frozen = cls(*_shape_of(layer), levels=layer.levels)
        frozen.signs, frozen.scale = _signs_and_scale(layer.quantized_weight(), zeros=layer.levels == "ternary")
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        signs = self.signs.to(x.dtype)
        return F.conv2d(x, signs, None, self.stride, self.padding, self.dilation) * self.scale

    def quantized_weight(self) -> Tensor:
        return self.signs.to(self.scale.dtype) * self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels!r}"


class FrozenModulatedConv2d(FrozenConv2d):
    r"""What is left of a :class:`~pcnn_lightning.layers.ModulatedConv2d`: ``conv2d(x, Q)``.

    Q[h * K + k] = Ĉ[h] ∘ \|M_k\| has K times the elements of Ĉ, and is made anew in each forward pass.

    Args:
        planes: K.
        average: MCN-1: one number a plane.
        levels: U, or None for U-MCN, whose Ĉ = C has as many values as elements.

    All other arguments and attributes are those of :class:`FrozenConv2d`.

    Attributes:
        signs: of Ĉ, (out_channels / K, in_channels, kh, kw) int8, if U = 2, else None.
        scale: a, a scalar, if U = 2, else None.
        codes: which of ``values`` each element of Ĉ is, shaped like ``signs``, int8, if U = 3 or 4, else None.
        values: the k-means centres, (U,), if U = 3 or 4, else None.
        kernels: Ĉ itself, if U is None, else None.
        modulation: \|M\|, (K, kh, kw), or (K, 1, 1) where ``average``.
    """

    signs: Tensor | None
    scale: Tensor | None
    codes: Tensor | None
    values: Tensor | None
    kernels: Tensor | None
    modulation: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | Padding = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        planes: int = 4,
        average: bool = False,
        levels: int | None = 2,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation)
        if levels not in (None, 2, 3, 4):
            raise ValueError(f"levels must be 2, 3, 4 or None, but got {levels!r}")
        self.planes, self.average, self.levels = planes, average, levels
        self.symbols = range(-1, 2, 2) if levels == 2 else range(levels or 0)
        shape = (out_channels // planes, in_channels, *self.kernel_size)
        self.register_buffer("signs", torch.ones(shape, dtype=torch.int8) if levels == 2 else None)
        self.register_buffer("scale", torch.ones(()) if levels == 2 else None)
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8) if levels in (3, 4) else None)
        self.register_buffer("values", torch.zeros(levels) if levels in (3, 4) else None)
        self.register_buffer("kernels", torch.zeros(shape) if levels is None else None)
        self.register_buffer("modulation", torch.ones(planes, *((1, 1) if average else self.kernel_size)))

    @classmethod
    @torch.no_grad()
    def of(cls, layer: ModulatedConv2d) -> "FrozenModulatedConv2d":
        """Freeze ``layer`` as it is now.

        Raises:
            ValueError: if a number in it is not finite.
        """
        _check_finite(layer)
        levels = layer.levels if layer.binarize else None
        frozen = cls(*_shape_of(layer), planes=layer.planes, average=layer.average, levels=levels)
        unmodulated = torch.ones_like(layer.modulation[:1])
        kernels, _ = modulate(
            layer.weight, unmodulated, scale=layer.scale, centers=layer.centers, binarize=layer.binarize
        )
        if levels == 2:
            frozen.signs, frozen.scale = _signs_and_scale(kernels, zeros=False)
        elif layer.centers is not None and levels is not None:
            frozen.values = layer.centers.clone()
            frozen.codes = torch.bucketize(kernels, layer.centers).to(torch.int8)
        else:
            frozen.kernels = kernels
        modulation = layer.modulation.abs()
        frozen.modulation = modulation.mean(dim=(-2, -1), keepdim=True) if layer.average else modulation
        return frozen

    def quantized_kernels(self) -> Tensor:
        """Ĉ, (out_channels / K, in_channels, kh, kw)."""
        if self.signs is not None and self.scale is not None:
            return self.signs.to(self.scale.dtype) * self.scale
        if self.codes is not None and self.values is not None:
            return self.values[self.codes.long()]
        assert self.kernels is not None
        return self.kernels

    def quantized_weight(self) -> Tensor:
        return (self.quantized_kernels().unsqueeze(1) * self.modulation.unsqueeze(1)).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, planes={self.planes}, average={self.average}, levels={self.levels}"


class FrozenBatchNorm2d(nn.Module):
    """What is left of a batch norm: ``x * scale + shift``, bit for bit what torch's makes of it on a CPU.

    Where the machine fuses the two into one operation, their sign is that of the exact ``x * scale + shift``.

    Args:
        num_features: number of channels.

    Attributes:
        scale: (num_features,), γ / √(variance + ε), of γ's sign.
        shift: (num_features,), β - mean · scale.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_buffer("scale", torch.ones(num_features))
        self.register_buffer("shift", torch.zeros(num_features))

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.BatchNorm2d) -> "FrozenBatchNorm2d":
        """Freeze ``norm`` as it is now.

        Raises:
            ValueError: if it has no running statistics.
        """
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            raise ValueError("a batch norm to freeze must have running statistics, but has track_running_stats=False")
        frozen = cls(norm.num_features)
        # With the operations of torch's own kernel for the CPU, which folds its four numbers in every forward pass.
        scale = (variance + norm.eps).rsqrt()
        frozen.scale = scale if norm.weight is None else scale * norm.weight
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias
        frozen.shift = torch.addcmul(bias, mean, frozen.scale, value=-1)
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift[:, None, None], x, self.scale[:, None, None])

    def extra_repr(self) -> str:
        return f"{self.num_features}"


def _shape_of(
    layer: QuantizedConv2d,
) -> tuple[int, int, tuple[int, int], tuple[int, int], Padding, tuple[int, int]]:
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation


def _signs_and_scale(kernels: Tensor, *, zeros: bool) -> tuple[Tensor, Tensor]:
    """Signs (int8) and their scale of kernels that hold ±scale, and 0 where ``zeros``."""
    signs = kernels.sign() if zeros else 1.0 - 2.0 * (kernels < 0)  # all 0, and binary: a scale of 0 and any signs
    return signs.to(torch.int8), kernels.abs().amax()


def _check_finite(layer: QuantizedConv2d) -> None:
    if not all(values.isfinite().all() for values in (*layer.parameters(), *layer.buffers())):
        raise ValueError("a layer to freeze must be finite, as its signs do not tell, but holds NaN or infinite values")
