"""The layer of projection convolutional networks."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pcnn_lightning.functional import Levels, ProjectionForward, eta_square, project
from pcnn_lightning.layers.checks import check_at_least, check_choice
from pcnn_lightning.layers.convolution import QuantizedConv2d

ProjectionInit = Literal["normal", "signs", "near_one", "ones"]


class ProjectionConv2d(QuantizedConv2d):
    r"""Convolution with kernels quantised through J learned projections (3.46-3.48): ``conv2d(x, D)``.

    It convolves its input as it is; put a :class:`SignActivation` in front for 1-bit activations. There is no bias
    and no groups. In a loop of your own::

        loss = task_loss + sum(layer.projection_loss() for layer in layers)
        loss.backward()  # leaves (3.49) in layer.weight.grad and (3.53) in layer.projection.grad

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, a multiple of ``projections``.
        kernel_size: an integer or a pair.
        stride: an integer or a pair.
        padding: an integer, a pair, ``"valid"`` or ``"same"``.
        dilation: an integer or a pair.
        groups: 1. The argument exists so that another value is refused rather than dropped.
        projections: J, how many projections quantise each kernel.
        levels: ``"binary"`` or ``"ternary"``; may be assigned at any time.
        sigma: σ; a ternary layer sets to zero what is at most σ * mean|C|.
        projection_loss_weight: λ of :meth:`projection_loss`.
        eta: η of 3.42. With η > 0 a layer is to be called once in each forward pass, and not under reentrant
            activation checkpointing.
        projection_forward: whether all of W_j (``"full"``) or its mean (``"mean"``) quantises. With the mean, the J
            kernels of a binary layer are equal up to sign. Default: full for J > 1, mean for J = 1.
        projection_init: W ~ N(0, 1) (``"normal"``), ±1 (``"signs"``), N(1, 0.1) (``"near_one"``) or 1 (``"ones"``).
            Default: normal with the full forward, near one with the mean: there, the gradient (3.49) of an element
            whose W has another sign than the mean points uphill.

    Attributes:
        weight: C, (out_channels / J, in_channels, kh, kw).
        projection: W, (J, kh, kw).

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

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
        projections: int = 1,
        levels: Levels = "binary",
        sigma: float = 0.7,
        projection_loss_weight: float = 1e-4,
        eta: float = 0.0,
        projection_forward: ProjectionForward | None = None,
        projection_init: ProjectionInit | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, projections, "projections"
        )
        if not isinstance(sigma, (int, float)) or not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be a positive number, but got {sigma!r}")
        check_at_least("projection_loss_weight", projection_loss_weight, 0)
        check_at_least("eta", eta, 0)
        if projection_forward is None:
            projection_forward = "mean" if projections == 1 else "full"
        check_choice("projection_forward", projection_forward, get_args(ProjectionForward))
        if projection_init is None:
            projection_init = "near_one" if projection_forward == "mean" else "normal"
        check_choice("projection_init", projection_init, get_args(ProjectionInit))
        self.projections, self.sigma, self.eta = projections, sigma, eta
        self.step_sums: tuple[Tensor, Tensor] | None = None
        self.levels = levels
        self.projection_loss_weight = projection_loss_weight
        self.projection_forward, self.projection_init = projection_forward, projection_init
        self.projection = nn.Parameter(torch.empty(projections, *self.kernel_size))
        self.reset_parameters()

    @property
    def levels(self) -> Levels:
        """The set Ω that kernels are quantised to."""
        return self._levels

    @levels.setter
    def levels(self, levels: Levels) -> None:
        check_choice("levels", levels, get_args(Levels))
        self._levels: Levels = levels
        self.forget_forward()

    def reset_parameters(self) -> None:
        """Draw C (He et al., for the fan-in of the kernels that convolve) and W anew."""
        nn.init.kaiming_normal_(self.weight)
        self.reset_projection()

    @torch.no_grad()
    def reset_projection(self, generator: torch.Generator | None = None) -> None:
        """Draw W anew from its initial distribution.

        Args:
            generator: a CPU generator, so that every device and process draws the same; default torch's own.
        """
        shape, dtype = self.projection.shape, self.projection.dtype
        if self.projection_init == "normal":
            drawn = torch.randn(shape, generator=generator)
        elif self.projection_init == "signs":
            drawn = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
        elif self.projection_init == "near_one":
            drawn = 1 + 0.1 * torch.randn(shape, generator=generator)
        else:
            drawn = torch.ones(shape)
        self.projection.copy_(drawn.to(dtype))
        self.forget_forward()

    def projection_loss(self) -> Tensor:
        """This layer's share of the projection loss (3.42), weighted with λ; see :meth:`quantization_loss`."""
        return self.quantization_loss()

    def sum_step_gradients(self) -> None:
        """Hold back the term of ``projection.grad`` that is quadratic in η until :meth:`add_eta_square`.

        All other gradients add up over micro-batches and average over processes; that one needs the δ of the whole
        step. A loop with one micro-batch and one process need not call this, nor one with η = 0.
        """
        quantized, loss = self.quantize()
        zeros = (torch.zeros_like(quantized), torch.zeros_like(loss))
        self.step_sums = (zeros[0].requires_grad_(), zeros[1].requires_grad_())

    @torch.no_grad()
    def add_eta_square(self) -> None:
        """Add the term held back to ``projection.grad``, once a step, after unscaling and before the update."""
        if self.step_sums is None:
            return
        quantized_sum, loss_sum = (total.grad for total in self.step_sums)
        for total in self.step_sums:
            total.grad = None
        if quantized_sum is None or loss_sum is None or self.projection.grad is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(quantized_sum)
            torch.distributed.all_reduce(loss_sum)
        # Where L_P took no part in the loss (a sum of zero) there is no such term.
        delta = torch.where(loss_sum == 0, 0.0, quantized_sum / loss_sum)
        self.projection.grad += eta_square(
            self.projection, delta, loss_weight=self.projection_loss_weight, eta=self.eta
        )

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        if self.training:
            return super().convolve(x, kernels)
        # Sums of signs are whole numbers and exact in any order, so that every runtime gets the same bits.
        return super().convolve(x, kernels.sign()) * kernels.abs().amax()

    def quantize(self) -> tuple[Tensor, Tensor]:
        return project(
            self.weight,
            self.projection,
            levels=self.levels,
            sigma=self.sigma,
            loss_weight=self.projection_loss_weight,
            eta=self.eta,
            projection_forward=self.projection_forward,
            step_sums=self.step_sums,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "step_sums": None}

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, projections={self.projections}, levels={self.levels!r}, "
            f"projection_forward={self.projection_forward!r}"
        )
