"""The layer of modulated convolutional networks."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pcnn_lightning.functional import kmeans_1d, modulate
from pcnn_lightning.layers.checks import check_at_least, check_choice
from pcnn_lightning.layers.convolution import QuantizedConv2d

ModulationInit = Literal["normal", "uniform", "near_one", "ones"]


class ModulatedConv2d(QuantizedConv2d):
    r"""Convolution with binarised kernels modulated by K learned M-Filters (3.12-3.17): ``conv2d(x, Q)``.

    It convolves its input as it is, with neither bias nor groups; activations of MCN are real. In a loop of your own::

        loss = task_loss + sum(layer.filter_loss() for layer in layers)
        loss.backward()  # leaves (3.20) in layer.weight.grad and (3.24) in layer.modulation.grad

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, a multiple of ``planes``.
        kernel_size: an integer or a pair.
        stride: an integer or a pair.
        padding: an integer, a pair, ``"valid"`` or ``"same"``.
        dilation: an integer or a pair.
        groups: 1. The argument exists so that another value is refused rather than dropped.
        planes: K, how many M-Filters modulate each kernel.
        average: MCN-1: each M-Filter acts by the mean of its absolute values, one number a plane.
        levels: U, how many values a kernel has before modulation: 2 for ±a, 3 or 4 for centres found by k-means, which
            stay as they are until :meth:`refresh_centers`.
        filter_loss_weight: θ of :meth:`filter_loss`.
        binarize: False is U-MCN, the reference: kernels are modulated as they are, and Ĉ of the filter loss is C held
            constant.
        scale: a of two levels; None takes mean|C|, recomputed in every forward pass.
        modulation_init: M ~ N(0, 1) (``"normal"``), U(0, 2) (``"uniform"``), N(1, 0.1) (``"near_one"``) or 1
            (``"ones"``, of which all planes stay equal but for what follows them).

    Attributes:
        weight: C, (out_channels / K, in_channels, kh, kw).
        modulation: M, (K, kh, kw). Only \|M\| is ever used.
        centers: the k-means centres (U,), rising; None for two levels.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    centers: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | Literal["valid", "same"] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        planes: int = 4,
        average: bool = False,
        levels: int = 2,
        filter_loss_weight: float = 1e-4,
        binarize: bool = True,
        scale: float | None = None,
        modulation_init: ModulationInit = "normal",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, planes, "planes")
        if levels not in (2, 3, 4):
            raise ValueError(f"levels must be 2, 3 or 4, but got {levels!r}")
        check_at_least("filter_loss_weight", filter_loss_weight, 0)
        if scale is not None and (not isinstance(scale, (int, float)) or not 0 < scale < math.inf):
            raise ValueError(f"scale must be a positive number or None, but got {scale!r}")
        if scale is not None and levels != 2:
            raise ValueError(f"scale is of two levels, but levels is {levels}, whose values are found by k-means")
        if not binarize and (levels != 2 or scale is not None):
            raise ValueError(f"binarize=False has no levels and no scale, but got levels={levels} and scale={scale}")
        check_choice("modulation_init", modulation_init, get_args(ModulationInit))
        self.planes, self.average, self.levels, self.binarize = planes, average, levels, binarize
        self.filter_loss_weight, self.scale, self.modulation_init = filter_loss_weight, scale, modulation_init
        self.modulation = nn.Parameter(torch.empty(planes, *self.kernel_size))
        self.register_buffer("centers", torch.zeros(levels) if levels > 2 else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw C (He et al., for the fan-in of the kernels that convolve) and M anew."""
        nn.init.kaiming_normal_(self.weight)
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
        """Find the k-means centres of C as it is now; to be called once an epoch. Two levels have none."""
        if self.centers is not None and not self.weight.is_meta:
            self.centers.copy_(kmeans_1d(self.weight, self.levels))
            self.forget_forward()

    def filter_loss(self) -> Tensor:
        """This layer's share of the filter loss (3.18), weighted with θ; see :meth:`quantization_loss`."""
        return self.quantization_loss()

    def quantize(self) -> tuple[Tensor, Tensor]:
        return modulate(
            self.weight,
            self.modulation,
            scale=self.scale,
            centers=self.centers,
            binarize=self.binarize,
            average=self.average,
            loss_weight=self.filter_loss_weight,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, planes={self.planes}, average={self.average}, levels={self.levels}, "
            f"binarize={self.binarize}"
        )
