"""The sign function for kernels and activations."""

from typing import Any, Literal

import torch
from torch import Tensor

SignGradient = Literal["clip", "polynomial"]


def sign(x: Tensor) -> Tensor:
    """Return the sign of each element, with ``sign(0) = +1``, so that the result holds only -1 and +1.

    NaN stays NaN instead of becoming -1, so that a diverged run shows in its loss.

    Args:
        x: tensor of any shape.

    Returns:
        A tensor like ``x``.

    Example:
        >>> sign(torch.tensor([-2.0, -0.0, 0.0, 0.5]))
        tensor([-1.,  1.,  1.,  1.])
    """
    # Three vectorized passes; torch.where is ten times slower on a CPU. And 0 * NaN is NaN.
    if torch.compiler.is_compiling():  # fused; compiled by torch 2.11, in-place operations lose the gradient
        return (x.sign() + 0.5).sign().add(x.clamp(-1, 1), alpha=0)
    return x.sign().add_(0.5).sign_().add_(x.clamp(-1, 1), alpha=0)


def sign_activation(x: Tensor, gradient: SignGradient = "clip") -> Tensor:
    r"""Binarize activations, replacing the gradient of the sign, which is zero almost everywhere, by a surrogate.

    .. math::
        \text{clip:}\quad \frac{\partial\,\mathrm{sign}}{\partial x} \approx 1_{|x| \le 1}
        \qquad\qquad
        \text{polynomial:}\quad \frac{\partial\,\mathrm{sign}}{\partial x} \approx \max(0,\; 2 - 2|x|)

    Args:
        x: activations of any shape.
        gradient: ``"clip"`` is the straight-through estimator of BinaryNet (Courbariaux et al., 2016,
            https://arxiv.org/abs/1602.02830); ``"polynomial"`` is the derivative of the piecewise second-order
            polynomial of Bi-Real Net (Liu et al., 2018, https://arxiv.org/abs/1808.00278).

    Returns:
        A tensor like ``x`` that holds -1 and +1.

    Example:
        >>> x = torch.tensor([-1.5, -0.5, 0.0, 0.75], requires_grad=True)
        >>> y = sign_activation(x)
        >>> y.detach()
        tensor([-1., -1.,  1.,  1.])
        >>> torch.autograd.grad(y.sum(), x)
        (tensor([0., 1., 1., 1.]),)
        >>> torch.autograd.grad(sign_activation(x, "polynomial").sum(), x)
        (tensor([0.0000, 1.0000, 2.0000, 0.5000]),)
    """
    signs: Tensor = _SignActivation.apply(x, gradient)
    return signs


class _SignActivation(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x: Tensor, gradient: SignGradient) -> Tensor:
        return sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SignGradient], output: Tensor) -> None:
        x, ctx.gradient = inputs
        # The clip needs only a mask; the polynomial needs the values of x.
        ctx.save_for_backward(x.abs() <= 1 if ctx.gradient == "clip" else x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        if ctx.gradient == "clip":
            return grad_output * saved, None
        return grad_output * (2 - 2 * saved.abs()).clamp(min=0), None


def straight_through(x: Tensor, values: Tensor) -> Tensor:
    """Return ``values``, exactly, and pass their gradient on to ``x`` unchanged.

    Args:
        x: tensor of any shape.
        values: tensor like ``x``.

    Example:
        >>> x = torch.tensor([0.2, -3.0], requires_grad=True)
        >>> straight_through(x, sign(x)).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    passed: Tensor = _StraightThrough.apply(x, values)
    return passed


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is needed in the backward pass."""

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None
