"""The sign of kernels and activations."""

from typing import Any, Literal

import torch
from torch import Tensor

SignGradient = Literal["clip", "polynomial"]


def sign(x: Tensor) -> Tensor:
    """Sign with ``sign(0) = +1``, so that the result holds two values and never three.

    A NaN is passed on rather than hidden in a -1, so that a broken run is noticed at its loss.
    """
    signs = x.sign().add_(0.5).sign_()  # three vectorised passes; torch.where takes ten times as long on a CPU
    return signs.add_(x.clamp(-1, 1), alpha=0)  # 0 * NaN is NaN


def sign_activation(x: Tensor, gradient: SignGradient = "clip") -> Tensor:
    r"""Binarise activations, with a pseudo-gradient in place of the sign's own, which is zero.

    .. math::
        \text{clip:}\quad \frac{\partial\,\mathrm{sign}}{\partial x} \approx 1_{|x| \le 1}
        \qquad\qquad
        \text{polynomial:}\quad \frac{\partial\,\mathrm{sign}}{\partial x} \approx \max(0,\; 2 - 2|x|)

    Args:
        x: activations of any shape.
        gradient: ``"clip"`` is the straight-through estimator of BinaryNet; ``"polynomial"`` is the derivative of
            the piecewise second-order polynomial of Bi-Real Net.

    Returns:
        A tensor like ``x`` holding -1 and +1.
    """
    signs: Tensor = _SignActivation.apply(x, gradient)
    return signs


class _SignActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: SignGradient) -> Tensor:
        ctx.gradient = gradient
        # The clip needs one bit of x; only the polynomial needs its value.
        ctx.save_for_backward(x.abs() <= 1 if gradient == "clip" else x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        if ctx.gradient == "clip":
            return grad_output * saved, None
        return grad_output * (2 - 2 * saved.abs()).clamp(min=0), None
