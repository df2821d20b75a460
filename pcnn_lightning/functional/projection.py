r"""Projection convolutional neural networks (PCNN).

Gu et al., "Projection Convolutional Neural Networks for 1-bit CNNs via Discrete Back Propagation", AAAI 2019,
https://arxiv.org/abs/1811.12755.

Shapes, with O = out_channels / J and in = in_channels / groups: the latent kernels ``weight`` C are (O, in, kh, kw),
the projection matrices ``projection`` W are (J, kh, kw) and the quantized kernels D are (O * J, in, kh, kw) with
``D[o * J + j] = Ĉ_j[o]``.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from pcnn_lightning.functional.signs import sign

ProjectionForward = Literal["full", "mean"]


def project(
    weight: Tensor,
    projection: Tensor,
    *,
    levels: int = 2,
    sigma: float = 0.7,
    loss_weight: float = 0.0,
    eta: float = 0.0,
    projection_forward: ProjectionForward = "full",
    step_sums: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Quantize kernels through J projections and compute the projection loss, as in PCNN.

    The method is that of https://arxiv.org/abs/1811.12755, the equation numbers are those of
    https://doi.org/10.1201/9781003376132. With :math:`\tilde W_j` being :math:`W_j` broadcast to the shape of C,
    :math:`\Delta = \sigma\,\mathrm{mean}|C|` and :math:`a = \mathrm{mean}|C|` (3.57-3.59), the forward pass is

    .. math::
        \hat C_j = a\,\mathrm{sign}(\tilde W_j \circ C)
        \quad\text{or}\quad
        \hat C_j = \Delta\,\mathrm{sign}(\tilde W_j \circ C)\,1_{|\tilde W_j \circ C| > \Delta},
        \qquad
        L_P = \frac{\lambda}{2} \sum_j \lVert \hat C_j - \tilde W_j \circ (C + \eta\,\delta_j) \rVert^2
        \quad (3.42)

    and the backward pass is discrete backpropagation via projection (3.49-3.56): with :math:`\delta_j` the gradient
    of the task loss with respect to :math:`\hat C_j`,
    :math:`r_j = \tilde W_j \circ (C + \eta\,\delta_j) - \hat C_j` and
    :math:`1_j = [\,|\tilde W_j \circ C| \le 1\,]`,

    .. math::
        \frac{\partial L}{\partial C} &= \sum_j \delta_j \circ 1_j \circ \tilde W_j
            + \lambda \sum_j r_j \circ \tilde W_j \\
        \frac{\partial L}{\partial W_j} &= \sum_{o,i} \bigl( \delta_j \circ 1_j \circ C
            + \lambda\, r_j \circ (C + \eta\,\delta_j) \bigr)

    A single autograd node returns both outputs because it needs both incoming gradients: that of L_P is the factor s
    by which the caller scaled the whole loss (fp16 loss scaling, gradient accumulation), and :math:`\delta_j` is that
    of D divided by s.

    Args:
        weight: C, (O, in, kh, kw).
        projection: W, (J, kh, kw).
        levels: 2 for binary kernels, Ω = {-a, +a}, or 3 for ternary kernels, Ω = {-Δ, 0, +Δ}.
        sigma: σ, the ternary threshold in units of mean|C|.
        loss_weight: λ.
        eta: η, how far the loss looks ahead along the task gradient. The *value* of L_P is computed with η = 0, since
            :math:`\delta_j` is unknown before the backward pass; the gradients are exact.
        projection_forward: quantize with all of W_j (``"full"``) or with its mean (``"mean"``). The gradients use all
            of W_j in both cases.
        step_sums: two leaf tensors with the shapes of D and L_P, in whose ``grad`` autograd accumulates the two
            incoming gradients. If given, the backward pass omits the only term that is not linear in
            :math:`\delta_j`; a caller that accumulates gradients over micro-batches or processes adds it once per
            step with :func:`eta_square`.

    Returns:
        D of shape (O * J, in, kh, kw), and the scalar L_P in at least float32.

    Example:
        >>> weight = torch.tensor([-0.75, 0.125, 0.125, 1.0]).view(1, 1, 2, 2)  # mean|C| = 0.5
        >>> projection = torch.stack([torch.ones(2, 2), -torch.ones(2, 2)])
        >>> kernels, loss = project(weight, projection)
        >>> kernels.flatten(1)  # one row per projection
        tensor([[-0.5000,  0.5000,  0.5000,  0.5000],
                [ 0.5000, -0.5000, -0.5000, -0.5000]])
        >>> kernels, loss = project(weight, projection, levels=3, sigma=0.5)
        >>> kernels.unique()  # ternary kernels hold three values
        tensor([-0.2500,  0.0000,  0.2500])
    """
    options = (levels, sigma, loss_weight, eta, projection_forward)
    quantized, loss = _Project.apply(weight, projection, *(step_sums or (None, None)), options)
    return quantized, loss


def eta_square(projection: Tensor, quantized_grad: Tensor, *, loss_weight: float, eta: float) -> Tensor:
    r"""Compute the term of 3.53-3.56 that is quadratic in δ.

    .. math::
        \lambda \eta^2 \sum_{o,i} \tilde W_j \circ \delta_j^2

    It completes the gradient that :func:`project` leaves when it is given ``step_sums``. Equation numbers are those of
    https://doi.org/10.1201/9781003376132.

    Args:
        projection: W, (J, kh, kw).
        quantized_grad: δ accumulated over the whole step, (O * J, in, kh, kw), without any loss scale.
        loss_weight: λ.
        eta: η.

    Returns:
        The term to add to the gradient of ``projection``, (J, kh, kw).

    Example:
        >>> projection = torch.tensor([[[1.0, 2.0]]])
        >>> quantized_grad = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
        >>> eta_square(projection, quantized_grad, loss_weight=0.5, eta=2.0)  # 2 · W ∘ δ²
        tensor([[[ 2., 36.]]])
    """
    count, (channels, *kernel_size) = projection.shape[0], quantized_grad.shape[1:]
    squares = quantized_grad.square().reshape(-1, count, channels, *kernel_size).sum(dim=(0, 2))
    return loss_weight * eta**2 * projection * squares


def _quantize(
    kernels: Tensor, matrices: Tensor, levels: int, sigma: float, projection_forward: ProjectionForward
) -> Tensor:
    """Compute Ĉ, (O, J, in, kh, kw), from C, (O, 1, in, kh, kw), and W, (1, J, 1, kh, kw)."""
    if projection_forward == "mean":
        matrices = matrices.mean(dim=(-2, -1), keepdim=True)
    product = matrices * kernels
    scale = kernels.abs().mean()
    if levels == 2:
        return scale * sign(product)
    threshold = sigma * scale
    return threshold * torch.where(product.abs() > threshold, sign(product), 0.0)


class _Project(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(
        weight: Tensor,
        projection: Tensor,
        quantized_sum: Tensor | None,
        loss_sum: Tensor | None,
        options: tuple[int, float, float, float, ProjectionForward],
    ) -> tuple[Tensor, Tensor]:
        levels, sigma, loss_weight, _, projection_forward = options
        kernels, matrices = weight.unsqueeze(1), projection[None, :, None]
        quantized = _quantize(kernels, matrices, levels, sigma, projection_forward)
        residual = (matrices * kernels - quantized).to(torch.promote_types(weight.dtype, torch.float32))
        return quantized.flatten(0, 1), 0.5 * loss_weight * residual.square().sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, projection, quantized_sum, _, ctx.options = inputs
        ctx.save_for_backward(weight, projection)
        ctx.sums_wanted = quantized_sum is not None

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        levels, sigma, loss_weight, eta, projection_forward = ctx.options
        weight, projection = ctx.saved_tensors
        kernels, matrices = weight.unsqueeze(1), projection[None, :, None]
        product = matrices * kernels
        by_projection = grad_quantized.reshape(weight.shape[0], -1, *weight.shape[1:])

        # The gradient at W̃_j ∘ C; the chain rule then multiplies by W̃_j for C and by C for W_j.
        task = by_projection * (product.abs() <= 1)
        pull = loss_weight * grad_loss.to(weight.dtype)
        residual = product - _quantize(kernels, matrices, levels, sigma, projection_forward)
        if eta == 0:
            # Two sums rather than one, so that the gradient has the same bits if the loss comes from a second call.
            pulled = pull * residual
            grad_weight = (task * matrices).sum(dim=1) + (pulled * matrices).sum(dim=1)
            grad_projection = (task * kernels).sum(dim=(0, 2)) + (pulled * kernels).sum(dim=(0, 2))
        else:
            # δ must not contain the loss scale. If L_P is not part of the loss, the look-ahead is zero.
            ahead = eta * torch.where(grad_loss == 0, 0.0, by_projection / grad_loss)
            looked_ahead = residual + matrices * ahead
            grad_weight = ((task + pull * looked_ahead) * matrices).sum(dim=1)
            ahead_only = residual if ctx.sums_wanted else looked_ahead
            per_kernel = task * kernels + pull * (looked_ahead * kernels + ahead_only * ahead)
            grad_projection = per_kernel.sum(dim=(0, 2))
        # Clones, because autograd accumulates in place and grad_loss shares memory with other layers (expanded sum).
        sums = (grad_quantized.clone(), grad_loss.clone()) if ctx.sums_wanted else (None, None)
        return grad_weight, grad_projection, *sums, None
