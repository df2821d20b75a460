r"""Modulated convolutional networks: Wang et al., "Modulated Convolutional Networks", CVPR 2018.

Shapes, with O = out_channels / K: kernels ``weight`` C is (O, in, kh, kw), M-Filters ``modulation`` M is (K, kh, kw),
and the modulated kernels Q are (O * K, in, kh, kw) with ``Q[h * K + k] = Ĉ[h] ∘ |M_k|``.
"""

from typing import Any

import torch
from torch import Tensor

from pcnn_lightning.functional.signs import sign


def modulate(
    weight: Tensor,
    modulation: Tensor,
    *,
    scale: float | None = None,
    centers: Tensor | None = None,
    binarize: bool = True,
    average: bool = False,
    loss_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Quantise kernels and modulate them by M-Filters; also return the filter loss of doing so.

    .. math::
        \hat C = a\,\mathrm{sign}(C), \qquad
        Q_{hk} = \hat C_h \circ |M_k| \quad (3.12\text{-}3.17), \qquad
        L_M = \frac{\theta}{2} \sum_k \lVert C - \hat C \circ |M_k| \rVert^2 \quad (3.18)

    and the backward pass goes straight through the quantiser (3.20-3.27): with :math:`\delta_k` the gradient of the
    task loss by :math:`Q_k`,

    .. math::
        \frac{\partial L}{\partial C} &= \sum_k \delta_k \circ |M_k| + \theta \sum_k (C - \hat C \circ |M_k|) \\
        \frac{\partial L}{\partial |M_k|} &= \sum_{h,c} \bigl( \delta_k \circ \hat C
            - \theta\,(C - \hat C \circ |M_k|) \circ \hat C \bigr)

    which reaches M_k multiplied by its sign, so that M and -M learn the same.

    Args:
        weight: C, (O, in, kh, kw).
        modulation: M, (K, kh, kw).
        scale: a; None takes mean|C|, recomputed every time and never differentiated.
        centers: values that C is rounded to, (U,) in rising order, in place of ±a.
        binarize: False leaves Ĉ = C (U-MCN, the reference).
        average: each \|M_k\| replaced by its mean (MCN-1).
        loss_weight: θ.

    Returns:
        Q of shape (O * K, in, kh, kw) with ``Q[h * K + k] = Ĉ[h] ∘ |M_k|``, and the scalar L_M, in at least float32.
    """
    planes = modulation * sign(modulation.detach())
    if average:
        planes = planes.mean(dim=(-2, -1), keepdim=True)
    planes = planes[None, :, None]
    quantized = weight.detach()
    if binarize and centers is not None:
        quantized = nearest(quantized, centers)
    elif binarize:
        quantized = (quantized.abs().mean() if scale is None else scale) * sign(quantized)
    modulated = _StraightThrough.apply(weight, quantized).unsqueeze(1) * planes
    residual = weight.unsqueeze(1) - quantized.unsqueeze(1) * planes
    residual = residual.to(torch.promote_types(weight.dtype, torch.float32))
    return modulated.flatten(0, 1), 0.5 * loss_weight * residual.square().sum()


class _StraightThrough(torch.autograd.Function):
    """Pass ``quantized`` forward, exactly, and its gradient on to ``weight``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor) -> tuple[Tensor, None]:
        return grad_quantized, None


def nearest(x: Tensor, centers: Tensor) -> Tensor:
    """Round each element of ``x`` to the nearest of ``centers`` (U,), which rise; half-way ones to the higher."""
    return centers[torch.bucketize(x.contiguous(), (centers[1:] + centers[:-1]) / 2, right=True)]


def kmeans_1d(x: Tensor, count: int, iterations: int = 100) -> Tensor:
    """Centres of ``x`` in one dimension, by Lloyd's algorithm from its evenly spaced quantiles.

    Sorting makes a cluster an interval and its mean a difference of two prefix sums. Nothing is drawn, and all is
    computed on the CPU, whose prefix sums are the same every time: equal elements give equal centres.

    Args:
        x: numbers, any shape.
        count: U, number of centres.
        iterations: at most so many, should the centres not have settled before.

    Returns:
        The centres, (U,), rising, in the type and on the device of ``x``.
    """
    ordered = x.detach().flatten().cpu().double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    places = (torch.arange(count) + 0.5) / count * len(ordered)
    centers = ordered[places.long()]
    ends = torch.tensor([0, len(ordered)])
    for _ in range(iterations):
        borders = torch.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        borders = torch.cat([ends[:1], borders, ends[1:]])
        sizes = borders.diff()
        means = sums[borders].diff() / sizes.clamp(min=1)
        moved = torch.where(sizes > 0, means, centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers.sort().values.to(x)
