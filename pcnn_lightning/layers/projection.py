"""The layer of projection convolutional networks."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pcnn_lightning.checks import check_choice, check_number, check_positive
from pcnn_lightning.functional import Normalization, ProjectionForward, eta_square, normalize_filters, project
from pcnn_lightning.layers.convolution import Padding, QuantizedConv2d

ProjectionInit = Literal["normal", "signs", "near_one", "ones"]


class ProjectionConv2d(QuantizedConv2d):
    r"""Convolution with kernels quantized through J learned projections (3.46-3.48): ``conv2d(x, D)``.

    Gu et al., "Projection Convolutional Neural Networks for 1-bit CNNs via Discrete Back Propagation", AAAI 2019,
    https://arxiv.org/abs/1811.12755. The layer convolves its input as given; put a :class:`SignActivation` in front of
    it for 1-bit activations. Its inference layer is a :class:`FrozenConv2d` that holds the signs of D.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output, a multiple of ``groups * projections``.
        kernel_size: an integer or a pair.
        stride: an integer or a pair.
        padding: an integer, a pair, ``"valid"`` or ``"same"``.
        dilation: an integer or a pair.
        groups: number of groups that the channels are divided into; ``in_channels`` makes a depthwise convolution.
        bias: whether to add a learned bias to the output.
        projections: J, number of projections of each kernel. The J kernels made from one yield adjacent output
            channels, so J must divide ``out_channels / groups`` for all of them to convolve the same input channels.
        stage: ``"binary"``, ``"ternary"`` or ``"real"``; :meth:`set_stage` changes it. In stage ``"real"``, the
            kernels are W̃_j ∘ C, which the other two quantize, and there is no projection loss.
        sigma: σ; in the ternary stage, elements of at most σ · mean|C| become zero.
        projection_loss_weight: λ of :meth:`quantization_loss` (3.42).
        eta: η of 3.42. With η > 0 a layer must be called once in each forward pass, and not under reentrant
            activation checkpointing.
        projection_forward: quantize with all of W_j (``"full"``) or with its mean (``"mean"``). With the mean, the J
            kernels of a binary layer are equal up to sign. Default: full for J > 1, mean for J = 1.
        projection_init: W ~ N(0, 1) (``"normal"``), ±1 (``"signs"``), N(1, 0.1) (``"near_one"``) or 1 (``"ones"``).
            Default: normal with the full forward, near one with the mean: there, the gradient (3.49) of an element
            whose W has the opposite sign of the mean points uphill.
        normalization: ``"center"`` or ``"standardize"`` each filter of C before it is projected, or ``"none"``; see
            :func:`pcnn_lightning.functional.normalize_filters`. All equations are then those of the normalized kernels
            C̃, the scale a = mean|C̃| and the projection loss included, and the gradient flows on to C.

    Attributes:
        weight: C, (out_channels / J, in_channels / groups, kh, kw).
        bias: (out_channels,), at first 0; None without a bias.
        projection: W, (J, kh, kw).

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.

    Example:
        >>> layer = ProjectionConv2d(8, 16, 3, padding=1, projections=4)
        >>> y = layer(torch.randn(1, 8, 5, 5))
        >>> loss = y.square().mean() + layer.quantization_loss()
        >>> loss.backward()  # leaves (3.49) in layer.weight.grad and (3.53) in layer.projection.grad
        >>> layer.quantized_weight().unique().numel()
        2
        >>> layer.set_stage("ternary")
        >>> layer.quantized_weight().unique().numel()
        3
    """

    second_parameter = "projection"
    loss_name = "projection_loss"
    planes_name = "projections"
    filter_symbol = "W"
    stages = ("real", "ternary", "binary")
    scaling = "layer"

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
        projections: int = 1,
        stage: Literal["real", "ternary", "binary"] = "binary",
        sigma: float = 0.7,
        projection_loss_weight: float = 1e-4,
        eta: float = 0.0,
        projection_forward: ProjectionForward | None = None,
        projection_init: ProjectionInit | None = None,
        normalization: Normalization = "none",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, planes=projections
        )
        check_positive("sigma", sigma)
        check_number("projection_loss_weight", projection_loss_weight, 0)
        check_number("eta", eta, 0)
        if projection_forward is None:
            projection_forward = "mean" if projections == 1 else "full"
        check_choice("projection_forward", projection_forward, get_args(ProjectionForward))
        if projection_init is None:
            projection_init = "near_one" if projection_forward == "mean" else "normal"
        check_choice("projection_init", projection_init, get_args(ProjectionInit))
        check_choice("normalization", normalization, get_args(Normalization))
        self.projections, self.sigma, self.eta, self.normalization = projections, sigma, eta, normalization
        self.projection_loss_weight = projection_loss_weight
        self.projection_forward, self.projection_init = projection_forward, projection_init
        self.projection = nn.Parameter(torch.empty(projections, *self.kernel_size))
        self.step_sums: tuple[Tensor, Tensor] | None = None
        self.reset_projection()
        self.set_stage(stage)

    def reset_parameters(self) -> None:
        """Draw C and W again."""
        super().reset_parameters()
        self.reset_projection()

    @torch.no_grad()
    def reset_projection(self, generator: torch.Generator | None = None) -> None:
        """Draw W again from its initial distribution.

        Args:
            generator: a CPU generator, so that all devices and processes draw the same; default: torch's own.
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

    @property
    def couples_gradients(self) -> bool:
        """True with η, since δ in the quantization loss is the gradient of the pass's kernels."""
        return self.eta > 0

    def quantize(self) -> tuple[Tensor, Tensor]:
        return project(
            normalize_filters(self.weight, self.normalization),
            self.projection,
            levels=self.levels,
            sigma=self.sigma,
            loss_weight=self.projection_loss_weight,
            eta=self.eta,
            projection_forward=self.projection_forward,
            step_sums=self.step_sums,
        )

    def unquantized(self) -> tuple[Tensor, Tensor | None]:
        """W̃_j ∘ C, the same shape as D, and a loss of 0."""
        by_mean = self.projection_forward == "mean"
        matrices = self.projection.mean(dim=(-2, -1), keepdim=True) if by_mean else self.projection
        weight = normalize_filters(self.weight, self.normalization)
        return (matrices.unsqueeze(1) * weight.unsqueeze(1)).flatten(0, 1), super().unquantized()[1]

    def filters(self) -> Tensor:
        """W, (J, kh, kw)."""
        return self.projection.detach().clone()

    # The term of W's gradient that is quadratic in η needs the δ of a whole update, while all others add up over
    # batches and average over processes.

    def begin_training(self, split_updates: bool) -> None:
        """Hold the quadratic term back until :meth:`before_step`, if several batches contribute to an update."""
        self.step_sums = None
        if split_updates and self.eta > 0:
            quantized, loss = self.quantize()  # whose shapes are those of all stages
            self.step_sums = (torch.zeros_like(quantized).requires_grad_(), torch.zeros_like(loss).requires_grad_())

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the term held back to ``projection.grad``, once per update, after unscaling."""
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

    def pending(self) -> dict[str, Tensor]:
        totals = zip(("quantized", "loss"), self.step_sums or (), strict=False)
        return {name: total.grad for name, total in totals if total.grad is not None}

    def restore_pending(self, pending: dict[str, Tensor]) -> None:
        for name, total in zip(("quantized", "loss"), self.step_sums or (), strict=False):
            if name in pending:
                total.grad = pending[name].to(total)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "step_sums": None}

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, projections={self.projections}, stage={self.stage!r}, "
            f"projection_forward={self.projection_forward!r}, normalization={self.normalization!r}"
        )
