r"""Modulated convolutional networks (MCN).

Wang et al., "Modulated Convolutional Networks", CVPR 2018,
https://openaccess.thecvf.com/content_cvpr_2018/html/Wang_Modulated_Convolutional_Networks_CVPR_2018_paper.html.

Shapes, with O = out_channels / K and in = in_channels / groups: the latent kernels ``weight`` C are (O, in, kh, kw),
the M-Filters ``modulation`` M are (K, kh, kw) and the modulated kernels Q are (O * K, in, kh, kw) with
``Q[h * K + k] = Ĉ[h] ∘ |M_k|``.
"""

import torch
from torch import Tensor

from pcnn_lightning.functional.signs import sign, straight_through


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
    r"""Quantize kernels, modulate them by M-Filters and compute the filter loss, as in MCN.

    The method is that of
    https://openaccess.thecvf.com/content_cvpr_2018/html/Wang_Modulated_Convolutional_Networks_CVPR_2018_paper.html,
    the equation numbers are those of https://doi.org/10.1201/9781003376132. The forward pass is

    .. math::
        \hat C = a\,\mathrm{sign}(C), \qquad
        Q_{hk} = \hat C_h \circ |M_k| \quad (3.12\text{-}3.17), \qquad
        L_M = \frac{\theta}{2} \sum_k \lVert C - \hat C \circ |M_k| \rVert^2 \quad (3.18)

    and the backward pass uses a straight-through estimator for the quantizer (3.20-3.27): with :math:`\delta_k` the
    gradient of the task loss with respect to :math:`Q_k`,

    .. math::
        \frac{\partial L}{\partial C} &= \sum_k \delta_k \circ |M_k| + \theta \sum_k (C - \hat C \circ |M_k|) \\
        \frac{\partial L}{\partial |M_k|} &= \sum_{h,c} \bigl( \delta_k \circ \hat C
            - \theta\,(C - \hat C \circ |M_k|) \circ \hat C \bigr)

    The gradient of \|M_k\| is multiplied by the sign of M_k, so that M and -M train identically.

    Args:
        weight: C, (O, in, kh, kw).
        modulation: M, (K, kh, kw).
        scale: a; None takes mean|C|, recomputed in each call and treated as a constant.
        centers: the values to which C is rounded instead of ±a, (U,) in ascending order.
        binarize: False keeps Ĉ = C (U-MCN, the unquantized reference).
        average: replace each \|M_k\| by its mean (MCN-1).
        loss_weight: θ.

    Returns:
        Q of shape (O * K, in, kh, kw) with ``Q[h * K + k] = Ĉ[h] ∘ |M_k|``, and the scalar L_M in at least float32.

    Example:
        >>> weight = torch.tensor([1.0, -3.0]).view(2, 1, 1, 1)  # two kernels, a = 2
        >>> modulation = torch.tensor([1.0, -0.5]).view(2, 1, 1)  # K = 2 M-Filters, of which |M| acts
        >>> kernels, loss = modulate(weight, modulation, loss_weight=1.0)
        >>> kernels.flatten()  # Q[h * K + k]: both M-Filters of the first kernel, then both of the second
        tensor([ 2.,  1., -2., -1.])
        >>> loss
        tensor(3.)
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
    modulated = straight_through(weight, quantized).unsqueeze(1) * planes
    residual = weight.unsqueeze(1) - quantized.unsqueeze(1) * planes
    residual = residual.to(torch.promote_types(weight.dtype, torch.float32))
    return modulated.flatten(0, 1), 0.5 * loss_weight * residual.square().sum()


def nearest(x: Tensor, centers: Tensor) -> Tensor:
    """Round each element of ``x`` to the nearest center; ties go to the higher one.

    :func:`modulate` quantizes kernels to more than two levels this way.

    Args:
        x: tensor of any shape.
        centers: (U,), in ascending order.

    Returns:
        A tensor of the shape of ``x`` with values from ``centers``.

    Example:
        >>> nearest(torch.tensor([-0.9, 0.4, 0.5, 3.0]), torch.tensor([0.0, 1.0]))
        tensor([0., 0., 1., 1.])
    """
    return centers[torch.bucketize(x.contiguous(), (centers[1:] + centers[:-1]) / 2, right=True)]


def kmeans_1d(x: Tensor, count: int, iterations: int = 100) -> Tensor:
    """Cluster the elements of ``x`` by Lloyd's algorithm, starting from evenly spaced quantiles.

    The result is what :func:`modulate` takes as ``centers``. It is deterministic: no random numbers are used, and
    everything is computed on the CPU, whose prefix sums are reproducible. In sorted order, each cluster is an interval
    and its mean a difference of two prefix sums.

    Args:
        x: tensor of any shape.
        count: U, number of centers.
        iterations: maximum number of iterations; the algorithm stops earlier once the centers no longer change.

    Returns:
        The centers, (U,), in ascending order, with the dtype and device of ``x``.

    Example:
        >>> kmeans_1d(torch.tensor([11.0, 0.0, 10.0, 1.0]), count=2)
        tensor([ 0.5000, 10.5000])
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
