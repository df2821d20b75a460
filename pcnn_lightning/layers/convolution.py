"""What the 1-bit convolutions have in common."""

from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcnn_lightning.layers.checks import check_choice, pair_of


class QuantizedConv2d(nn.Module):
    """A convolution whose kernels are made anew from fewer, learned ones, at a loss that is learned from too.

    It convolves its input as it is and has neither bias nor groups. A subclass says how kernels are made
    (:meth:`quantize`) and drawn (:meth:`reset_parameters`).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, a multiple of ``planes``.
        kernel_size: an integer or a pair.
        stride: an integer or a pair.
        padding: an integer, a pair, ``"valid"`` or ``"same"``.
        dilation: an integer or a pair.
        groups: 1. The argument exists so that another value is refused rather than dropped.
        planes: how many kernels are made of each one learned.
        planes_name: what the subclass calls that.

    Attributes:
        weight: C, (out_channels / planes, in_channels, kh, kw).

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int] | Literal["valid", "same"],
        dilation: int | tuple[int, int],
        groups: int,
        planes: int,
        planes_name: str,
    ) -> None:
        super().__init__()
        kernel_size = pair_of("kernel_size", kernel_size, 1)
        stride, dilation = pair_of("stride", stride, 1), pair_of("dilation", dilation, 1)
        if isinstance(padding, str):
            check_choice("padding", padding, ("valid", "same"))
            if padding == "same" and stride != (1, 1):
                raise ValueError(f"padding 'same' needs stride 1, but got stride {stride}")
        else:
            padding = pair_of("padding", padding, 0)
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels), (planes_name, planes)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an integer of at least 1, but got {count!r}")
        if out_channels % planes:
            raise ValueError(f"{planes_name} must divide out_channels={out_channels}, but got {planes}")
        if groups != 1:
            raise ValueError(f"groups must be 1 (grouped 1-bit convolutions are not supported), but got {groups}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.weight = nn.Parameter(torch.empty(out_channels // planes, in_channels, *kernel_size))
        self._loss_of_forward: Tensor | None = None

    @abstractmethod
    def quantize(self) -> tuple[Tensor, Tensor]:
        """The kernels that convolve, (out_channels, in_channels, kh, kw), and the weighted loss of making them."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, H, W), as :func:`torch.nn.functional.conv2d` does.

        Raises:
            ValueError: if the input does not have ``in_channels`` channels.
        """
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"expected an input of shape (B, {self.in_channels}, H, W), but got {tuple(x.shape)}: "
                f"this layer has in_channels={self.in_channels}"
            )
        quantized, loss = self.quantize()
        if self.training and torch.is_grad_enabled():
            # Kept for quantization_loss(): its gradient may need what will flow back through these very kernels.
            self._loss_of_forward = loss
        return self.convolve(x, quantized)

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Convolve (B, in_channels, H, W) with the layer's stride, padding and dilation."""
        return F.conv2d(x, kernels, None, self.stride, self.padding, self.dilation)

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """The kernels as they convolve, (out_channels, in_channels, kh, kw), detached."""
        return self.quantize()[0]

    def forget_forward(self) -> None:
        """Drop the loss of the last forward pass, because what it was computed from has changed."""
        self._loss_of_forward = None

    def quantization_loss(self) -> Tensor:
        """What making the kernels costs (3.42 or 3.18), weighted: a scalar, at least float32.

        After a forward pass in training mode it belongs to that pass (once: it is handed out and forgotten);
        otherwise it is computed from the parameters as they are.
        """
        if self._loss_of_forward is None or not torch.is_grad_enabled():
            return self.quantize()[1]
        loss, self._loss_of_forward = self._loss_of_forward, None
        return loss

    def train(self, mode: bool = True) -> "QuantizedConv2d":
        self.forget_forward()  # nobody asked for it; do not keep its graph
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # What lives between forward and backward is no part of a copy; graph tensors cannot be copied at all.
        return {**self.__dict__, "_loss_of_forward": None}

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}"
        )
