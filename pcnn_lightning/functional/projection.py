r"""Projection convolutional networks: Gu et al., "Projection Convolutional Neural Networks for 1-bit CNNs via Discrete
Back Propagation", AAAI 2019.

Shapes, with O = out_channels / J: kernels ``weight`` C is (O, in, kh, kw), projection matrices ``projection`` W is
(J, kh, kw), and the quantised kernels D are (O * J, in, kh, kw) with ``D[o * J + j] = Ĉ_j[o]``.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from pcnn_lightning.functional.signs import sign

Levels = Literal["binary", "ternary"]
ProjectionForward = Literal["full", "mean"]


def project(
    weight: Tensor,
    projection: Tensor,
    *,
    levels: Levels = "binary",
    sigma: float = 0.7,
    loss_weight: float = 0.0,
    eta: float = 0.0,
    projection_forward: ProjectionForward = "full",
    step_sums: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Quantise kernels through J projections; also return the projection loss of doing so.

    With :math:`\Delta = \sigma\,\mathrm{mean}|C|` and :math:`a = \mathrm{mean}|C|` (3.57-3.59), the forward pass is

    .. math::
        \hat C_j = a\,\mathrm{sign}(\tilde W_j \circ C)
        \quad\text{or}\quad
        \hat C_j = \Delta\,\mathrm{sign}(\tilde W_j \circ C)\,1_{|\tilde W_j \circ C| > \Delta},
        \qquad
        L_P = \frac{\lambda}{2} \sum_j \lVert \hat C_j - \tilde W_j \circ (C + \eta\,\delta_j) \rVert^2
        \quad (3.42)

    and the backward pass is discrete back-propagation via projection (3.49-3.56): with :math:`\delta_j` the gradient
    of the task loss by :math:`\hat C_j`, :math:`r_j = \tilde W_j \circ (C + \eta\,\delta_j) - \hat C_j` and
    :math:`1_j = [\,|\tilde W_j \circ C| \le 1\,]`,

    .. math::
        \frac{\partial L}{\partial C} &= \sum_j \delta_j \circ 1_j \circ \tilde W_j
            + \lambda \sum_j r_j \circ \tilde W_j \\
        \frac{\partial L}{\partial W_j} &= \sum_{o,i} \bigl( \delta_j \circ 1_j \circ C
            + \lambda\, r_j \circ (C + \eta\,\delta_j) \bigr)

    Both outputs come from one node because the second one's incoming gradient s is the factor by which the caller
    scaled the whole loss (fp16 scaling, accumulation), so that :math:`\delta_j` is the first one's divided by s.

    Args:
        weight: C, (O, in, kh, kw).
        projection: W, (J, kh, kw).
        levels: ``"binary"`` for Ω = {-a, +a}, ``"ternary"`` for Ω = {-Δ, 0, +Δ}.
        sigma: σ of the ternary threshold, in units of mean|C|.
        loss_weight: λ.
        eta: η, how far the loss looks ahead along the task gradient. The *value* returned has η = 0, since
            :math:`\delta_j` is not known before the backward pass; the gradients are exact.
        projection_forward: ``"mean"`` quantises with the mean of each W_j; the gradients use all of W either way.
        step_sums: two leaves, like D and like the loss, that autograd adds the two incoming gradients to. Given them,
            the backward pass leaves out the one term that is not linear in :math:`\delta_j`, so that a caller who
            accumulates over micro-batches or processes can add it once with :func:`eta_square`.

    Returns:
        D of shape (O * J, in, kh, kw) and the scalar L_P, in at least float32.
    """
    options = (levels, sigma, loss_weight, eta, projection_forward)
    quantized, loss = _Project.apply(weight, projection, *(step_sums or (None, None)), options)
    return quantized, loss


def eta_square(projection: Tensor, quantized_grad: Tensor, *, loss_weight: float, eta: float) -> Tensor:
    r"""The term of 3.53-3.56 that is quadratic in δ: :math:`\lambda \eta^2 \sum_{o,i} \tilde W_j \circ \delta_j^2`.

    Args:
        projection: W, (J, kh, kw).
        quantized_grad: δ of the whole step, (O * J, in, kh, kw), free of any loss scale.
        loss_weight: λ.
        eta: η.

    Returns:
        What to add to the gradient of ``projection``, (J, kh, kw).
    """
    count, (channels, *kernel_size) = projection.shape[0], quantized_grad.shape[1:]
    squares = quantized_grad.square().reshape(-1, count, channels, *kernel_size).sum(dim=(0, 2))
    return loss_weight * eta**2 * projection * squares


def _quantize(
    kernels: Tensor, matrices: Tensor, levels: Levels, sigma: float, projection_forward: ProjectionForward
) -> Tensor:
    """Ĉ of shape (O, J, in, kh, kw) from C as (O, 1, in, kh, kw) and W as (1, J, 1, kh, kw)."""
    if projection_forward == "mean":
        matrices = matrices.mean(dim=(-2, -1), keepdim=True)
    product = matrices * kernels
    scale = kernels.abs().mean()
    if levels == "binary":
        return scale * sign(product)
    threshold = sigma * scale
    return threshold * torch.where(product.abs() > threshold, sign(product), 0.0)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        projection: Tensor,
        quantized_sum: Tensor | None,
        loss_sum: Tensor | None,
        options: tuple[Levels, float, float, float, ProjectionForward],
    ) -> tuple[Tensor, Tensor]:
        levels, sigma, loss_weight, _, projection_forward = options
        ctx.save_for_backward(weight, projection)
        ctx.options, ctx.sums_wanted = options, quantized_sum is not None
        kernels, matrices = weight.unsqueeze(1), projection[None, :, None]
        quantized = _quantize(kernels, matrices, levels, sigma, projection_forward)
        residual = (matrices * kernels - quantized).to(torch.promote_types(weight.dtype, torch.float32))
        return quantized.flatten(0, 1), 0.5 * loss_weight * residual.square().sum()

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        levels, sigma, loss_weight, eta, projection_forward = ctx.options
        weight, projection = ctx.saved_tensors
        kernels, matrices = weight.unsqueeze(1), projection[None, :, None]
        product = matrices * kernels
        by_projection = grad_quantized.reshape(weight.shape[0], -1, *weight.shape[1:])

        # What arrives at W̃_j ∘ C; the chain rule then multiplies by W̃_j for C and by C for W_j.
        task = by_projection * (product.abs() <= 1)
        pull = loss_weight * grad_loss.to(weight.dtype)
        residual = product - _quantize(kernels, matrices, levels, sigma, projection_forward)
        if eta == 0:
            through = task + pull * residual
            grad_weight, per_kernel = through * matrices, through * kernels
        else:
            # δ is free of the loss scale; where L_P takes no part in the loss there is no δ either.
            ahead = eta * torch.where(grad_loss == 0, 0.0, by_projection / grad_loss)
            looked_ahead = residual + matrices * ahead
            grad_weight = (task + pull * looked_ahead) * matrices
            ahead_only = residual if ctx.sums_wanted else looked_ahead
            per_kernel = task * kernels + pull * (looked_ahead * kernels + ahead_only * ahead)
        # Copies: the loss's gradient shares its memory with other layers' (an expanded sum), and is added to in place.
        sums = (grad_quantized.clone(), grad_loss.clone()) if ctx.sums_wanted else (None, None)
        return grad_weight.sum(dim=1), per_kernel.sum(dim=(0, 2)), *sums, None
