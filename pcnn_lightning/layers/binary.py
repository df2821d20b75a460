"""The layer of plain binary networks."""

from typing import get_args

from torch import Tensor

from pcnn_lightning.checks import check_choice
from pcnn_lightning.functional import Normalization, binarize, normalize_filters
from pcnn_lightning.functional.binary import Scaling, WeightGradient
from pcnn_lightning.layers.convolution import Padding, QuantizedConv2d


class BinaryConv2d(QuantizedConv2d):
    """Convolution with binary kernels, a · sign(C): ``conv2d(x, D)``; see :func:`pcnn_lightning.functional.binarize`.

    With a :class:`SignActivation` in front it is the layer of XNOR-Net (https://arxiv.org/abs/1603.05279) and Bi-Real
    Net (https://arxiv.org/abs/1808.00278), on real activations that of BWN. There is no scale of the activations.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output.
        kernel_size: an integer or a pair.
        stride: an integer or a pair.
        padding: an integer, a pair, ``"valid"`` or ``"same"``.
        dilation: an integer or a pair.
        groups: number of groups that the channels are divided into; ``in_channels`` makes a depthwise convolution.
        bias: whether to add a learned bias to the output.
        scaling: one scale a per output ``"channel"``, per ``"layer"``, or none (``"none"``).
        gradient: gradient of the sign: ``"clip"`` where abs(C) <= 1, ``"identity"``, or ``"scaled"``: a times that of
            ``"clip"``.
        normalization: ``"center"`` or ``"standardize"`` each filter before its sign is taken, or ``"none"``.

    Attributes:
        weight: C, (out_channels, in_channels / groups, kh, kw).
        bias: (out_channels,), at first 0; None without a bias.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.

    Example:
        >>> layer = BinaryConv2d(8, 16, 3, padding=1)
        >>> layer(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 16, 5, 5])
        >>> layer.quantized_weight()[0].unique().numel(), layer.storage()
        (2, Storage(at_1_bit=1152, at_2_bits=0, at_32_bits=16))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        scaling: Scaling = "channel",
        gradient: WeightGradient = "clip",
        normalization: Normalization = "none",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        check_choice("scaling", scaling, get_args(Scaling))
        check_choice("gradient", gradient, get_args(WeightGradient))
        check_choice("normalization", normalization, get_args(Normalization))
        self.scaling, self.gradient, self.normalization = scaling, gradient, normalization

    def quantize(self) -> tuple[Tensor, None]:
        kernels = binarize(self.weight, scaling=self.scaling, gradient=self.gradient, normalization=self.normalization)
        return kernels, None

    def unquantized(self) -> tuple[Tensor, None]:
        """C, normalized as in the other stage."""
        return normalize_filters(self.weight, self.normalization), None

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, scaling={self.scaling!r}, gradient={self.gradient!r}, "
            f"normalization={self.normalization!r}"
        )
