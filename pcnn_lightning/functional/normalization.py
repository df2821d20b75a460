"""Normalization of filters before they are quantized."""

import math
from typing import Literal

from torch import Tensor

Normalization = Literal["none", "center", "standardize"]


def normalize_filters(weight: Tensor, normalization: Normalization = "standardize") -> Tensor:
    r"""Center or standardize each filter, as IR-Net does before it takes signs.

    .. math::
        \tilde C = \sqrt{\frac{2}{n}}\, \frac{C - \mu}{\sigma}

    with the mean μ and the standard deviation σ of the n = in · kh · kw elements of each filter, through which the
    gradient flows (Qin et al., CVPR 2020, https://arxiv.org/abs/1909.10788). The factor, which IR-Net does not have,
    leaves filters the standard deviation that He et al. draw them with: in the blocks of this package, no batch norm
    follows a convolution, so that features of another scale would add up. A filter of equal elements becomes zero, and
    has no gradient.

    Args:
        weight: C, (O, in, kh, kw).
        normalization: ``"center"`` subtracts μ, ``"standardize"`` also divides by σ √(n / 2), ``"none"`` does nothing.

    Returns:
        The normalized kernels, (O, in, kh, kw).

    Example:
        >>> weight = torch.tensor([[1.0, -3.0], [0.0, 4.0]]).reshape(2, 2, 1, 1)
        >>> normalize_filters(weight, "center").flatten(1)
        tensor([[ 2., -2.],
                [-2.,  2.]])
        >>> normalize_filters(weight).flatten(1)
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    if normalization == "none":
        return weight
    filters, elements = (1, 2, 3), weight[0].numel()
    centered = weight - weight.mean(dim=filters, keepdim=True)
    if normalization == "center":
        return centered
    deviation = centered.std(dim=filters, correction=0, keepdim=True)
    equal = deviation <= 1e-6 * weight.detach().abs().amax(dim=filters, keepdim=True)  # but for rounding
    return centered * (math.sqrt(2 / elements) / deviation.masked_fill(equal, math.inf))
