"""Normalization of filters before they are quantized."""

from typing import Literal

from torch import Tensor

Normalization = Literal["none", "center", "standardize"]


def normalize_filters(weight: Tensor, normalization: Normalization = "standardize") -> Tensor:
    r"""Center or standardize each filter, as IR-Net does before it takes signs.

    .. math::
        \tilde C = \frac{C - \mu}{\sigma}

    with the mean μ and the standard deviation σ of the in · kh · kw elements of each filter, through which the gradient
    flows (Qin et al., CVPR 2020, https://arxiv.org/abs/1909.10788). A filter of equal elements becomes zero.

    Args:
        weight: C, (O, in, kh, kw).
        normalization: ``"center"`` subtracts μ, ``"standardize"`` also divides by σ, ``"none"`` returns C.

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
    filters = (1, 2, 3)
    if normalization != "none":
        weight = weight - weight.mean(dim=filters, keepdim=True)
    if normalization == "standardize":
        weight = weight / weight.std(dim=filters, correction=0, keepdim=True).clamp(min=1e-12)
    return weight
