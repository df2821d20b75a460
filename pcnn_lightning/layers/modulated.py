"""The layers of modulated convolutional networks: trained, and for inference."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pcnn_lightning.checks import check_bool, check_choice, check_number, check_positive
from pcnn_lightning.functional import kmeans_1d, modulate
from pcnn_lightning.layers.convolution import FrozenConv2d, Padding, QuantizedConv2d, Storage

ModulationInit = Literal["normal", "uniform", "near_one", "ones"]


class ModulatedConv2d(QuantizedConv2d):
    r"""Convolution with binarized kernels modulated by K learned M-Filters (3.12-3.17): ``conv2d(x, Q)``.

    Wang et al., "Modulated Convolutional Networks", CVPR 2018. The layer convolves its input as given; activations of
    MCN are real. Its inference layer is a :class:`FrozenModulatedConv2d`.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output, a multiple of ``groups * planes``.
        kernel_size: an integer or a pair.
        stride: an integer or a pair.
        padding: an integer, a pair, ``"valid"`` or ``"same"``.
        dilation: an integer or a pair.
        groups: number of groups that the channels are divided into; ``in_channels`` makes a depthwise convolution.
        bias: whether to add a learned bias to the output.
        planes: K, number of M-Filters that modulate each kernel. The K kernels made from one yield adjacent output
            channels, so K must divide ``out_channels / groups`` for all of them to convolve the same input channels.
        average: MCN-1: each M-Filter acts by the mean of its absolute values, one number per plane.
        levels: U, number of values that a kernel has before modulation: 2 for ±a, 3 or 4 for k-means centers, which
            change only in :meth:`refresh_centers`.
        filter_loss_weight: θ of :meth:`quantization_loss` (3.18).
        binarize: False is U-MCN, the reference, which stays in stage ``"real"``: kernels are modulated without
            quantization, and Ĉ of the filter loss is C held constant.
        scale: a of two levels; None takes mean|C|, recomputed in every forward pass.
        modulation_init: M ~ N(0, 1) (``"normal"``), U(0, 2) (``"uniform"``), N(1, 0.1) (``"near_one"``) or 1
            (``"ones"``; all planes then stay equal as long as the layers behind them treat them alike).

    Attributes:
        weight: C, (out_channels / K, in_channels / groups, kh, kw).
        bias: (out_channels,), at first 0; None without a bias.
        modulation: M, (K, kh, kw). Only \|M\| is ever used.
        centers: the k-means centers (U,) in ascending order; None for two levels.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.

    Example:
        >>> layer = ModulatedConv2d(8, 16, 3, padding=1, planes=4)
        >>> y = layer(torch.randn(1, 8, 5, 5))
        >>> loss = y.square().mean() + layer.quantization_loss()
        >>> loss.backward()  # leaves (3.20) in layer.weight.grad and (3.24) in layer.modulation.grad
        >>> layer.weight.shape, layer.modulation.shape, layer.quantized_weight().shape
        (torch.Size([4, 8, 3, 3]), torch.Size([4, 3, 3]), torch.Size([16, 8, 3, 3]))
    """

    second_parameter = "modulation"
    loss_name = "filter_loss"
    filter_symbol = "|M|"
    convolves_signs = False
    centers: Tensor | None

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
        planes: int = 4,
        average: bool = False,
        levels: int = 2,
        filter_loss_weight: float = 1e-4,
        binarize: bool = True,
        scale: float | None = None,
        modulation_init: ModulationInit = "normal",
    ) -> None:
        if not binarize:
            self.stages = ("real",)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, planes=planes)
        if levels not in (2, 3, 4):
            raise ValueError(f"levels must be 2, 3 or 4, but got {levels!r}")
        check_number("filter_loss_weight", filter_loss_weight, 0)
        if scale is not None:
            check_positive("scale", scale)
        if scale is not None and levels != 2:
            raise ValueError(f"scale is for two levels, but levels is {levels}, whose values are found by k-means")
        if not binarize and (levels != 2 or scale is not None):
            raise ValueError(f"binarize=False has no levels and no scale, but got levels={levels} and scale={scale}")
        check_choice("modulation_init", modulation_init, get_args(ModulationInit))
        self._levels, self.average, self.binarize = levels, average, binarize
        self.filter_loss_weight, self.scale, self.modulation_init = filter_loss_weight, scale, modulation_init
        self.modulation = nn.Parameter(torch.empty(planes, *self.kernel_size))
        self.register_buffer("centers", torch.zeros(levels) if levels > 2 else None)
        self._reset_modulation()

    @property
    def levels(self) -> int:
        """U, number of values that a kernel has before modulation."""
        return self._levels

    def reset_parameters(self) -> None:
        """Draw C and M again."""
        super().reset_parameters()
        self._reset_modulation()

    @torch.no_grad()
    def _reset_modulation(self) -> None:
        if self.modulation_init == "normal":
            nn.init.normal_(self.modulation)
        elif self.modulation_init == "uniform":
            nn.init.uniform_(self.modulation, 0.0, 2.0)
        elif self.modulation_init == "near_one":
            nn.init.normal_(self.modulation, 1.0, 0.1)
        else:
            nn.init.ones_(self.modulation)
        self.refresh_centers()

    @torch.no_grad()
    def refresh_centers(self) -> None:
        """Find the k-means centers of C. Two levels have none."""
        if self.centers is not None and not self.weight.is_meta:
            self.centers.copy_(kmeans_1d(self.weight, self.levels))
            self.forget_forward()

    def begin_epoch(self) -> None:
        self.refresh_centers()

    def quantize(self) -> tuple[Tensor, Tensor]:
        return modulate(
            self.weight,
            self.modulation,
            scale=self.scale,
            centers=self.centers,
            average=self.average,
            loss_weight=self.filter_loss_weight,
        )

    def unquantized(self) -> tuple[Tensor, Tensor]:
        r"""C ∘ \|M_k\|, and the filter loss of U-MCN."""
        weight = self.filter_loss_weight
        return modulate(self.weight, self.modulation, binarize=False, average=self.average, loss_weight=weight)

    def storage(self) -> Storage:
        return self.frozen().storage()  # there is an inference layer with real kernels as well

    @torch.no_grad()
    def filters(self) -> Tensor:
        r"""\|M\|, (K, kh, kw), or its means, (K, 1, 1), with ``average``."""
        filters = self.modulation.abs()
        return filters.mean(dim=(-2, -1), keepdim=True) if self.average else filters

    @classmethod
    def empty_frozen(cls, *shape: Any, stage: str, planes: int = 1, **options: Any) -> "FrozenModulatedConv2d":
        layer = FrozenModulatedConv2d(*shape, planes=planes, **options)
        if (layer.kernels is not None) != (stage == "real"):
            raise ValueError(f"levels must be None in stage real and only there, but got {options} in stage {stage}")
        return layer

    @torch.no_grad()
    def frozen(self) -> "FrozenModulatedConv2d":
        is_real = self.stage == "real"
        levels = None if is_real else self.levels
        layer = self.empty_frozen(
            *self.shape, stage=self.stage, planes=self.planes, average=self.average, levels=levels
        )
        unmodulated = torch.ones_like(self.modulation[:1])
        scale, centers = (None, None) if is_real else (self.scale, self.centers)
        kernels, _ = modulate(self.weight, unmodulated, scale=scale, centers=centers, binarize=not is_real)
        if levels == 2:
            layer.signs, layer.scale = (1.0 - 2.0 * (kernels < 0)).to(torch.int8), kernels.abs().amax()
        elif centers is not None:
            layer.values = centers.clone()
            layer.codes = torch.bucketize(kernels, centers).to(torch.int8)
        else:
            layer.kernels = kernels
        layer.bias = None if self.bias is None else self.bias.clone()
        layer.modulation = self.filters()
        return layer

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, planes={self.planes}, average={self.average}, levels={self.levels}, "
            f"binarize={self.binarize}"
        )


class FrozenModulatedConv2d(FrozenConv2d):
    r"""A modulated convolution for inference: ``conv2d(x, Q) + bias`` with Q[h * K + k] = Ĉ[h] ∘ \|M_k\|.

    Q has K times the elements of Ĉ and is computed in each forward pass.

    Args:
        planes: K.
        average: MCN-1: one number per plane.
        levels: U, or None for U-MCN, whose Ĉ = C is not quantized.

    The other arguments and attributes are those of :class:`FrozenConv2d`.

    Attributes:
        signs: signs of Ĉ, (out_channels / K, in_channels / groups, kh, kw) int8, if U = 2, else None.
        scale: a, a scalar, if U = 2, else None.
        codes: index into ``values`` of each element of Ĉ, shaped like ``signs``, int8, if U = 3 or 4, else None.
        values: the k-means centers, (U,), if U = 3 or 4, else None.
        kernels: Ĉ itself, if U is None, else None.
        modulation: \|M\|, (K, kh, kw), or (K, 1, 1) with ``average``.
    """

    codes: Tensor | None
    values: Tensor | None
    kernels: Tensor | None
    modulation: Tensor

    def __init__(
        self, *args: Any, planes: int = 4, average: bool = False, levels: int | None = 2, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if levels not in (None, 2, 3, 4):
            raise ValueError(f"levels must be 2, 3, 4 or None, but got {levels!r}")
        check_bool("average", average)
        self.options = {"average": average, "levels": levels}
        self.planes, self.levels = planes, levels
        self.symbols = range(-1, 2, 2) if levels == 2 else range(levels or 0)
        kernels = (self.out_channels // planes, self.in_channels // self.groups, *self.kernel_size)
        self.register_buffer("signs", torch.ones(kernels, dtype=torch.int8) if levels == 2 else None)
        self.register_buffer("scale", torch.ones(()) if levels == 2 else None)
        self.register_buffer("codes", torch.zeros(kernels, dtype=torch.int8) if levels in (3, 4) else None)
        self.register_buffer("values", torch.zeros(levels) if levels in (3, 4) else None)
        self.register_buffer("kernels", torch.zeros(kernels) if levels is None else None)
        self.register_buffer("modulation", torch.ones(planes, *((1, 1) if average else self.kernel_size)))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.quantized_weight(), self.bias)

    def quantized_kernels(self) -> Tensor:
        """Ĉ, (out_channels / K, in_channels / groups, kh, kw)."""
        if self.signs is not None and self.scale is not None:
            return self.signs.to(self.scale.dtype) * self.scale
        if self.codes is not None and self.values is not None:
            return self.values[self.codes.long()]
        assert self.kernels is not None
        return self.kernels

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, planes={self.planes}"

    def quantized_weight(self) -> Tensor:
        return (self.quantized_kernels().unsqueeze(1) * self.modulation.unsqueeze(1)).flatten(0, 1)
