r"""Plain binary kernels: signs times a scale, with a straight-through gradient.

- BWN and XNOR-Net: Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
  ECCV 2016, https://arxiv.org/abs/1603.05279: one scale per output channel.
- Bi-Real Net: Liu et al., ECCV 2018, https://arxiv.org/abs/1808.00278: the same kernels, with a gradient that the
  scale multiplies (``gradient="scaled"``).
- IR-Net: Qin et al., "Forward and Backward Information Retention for Accurate Binary Neural Networks", CVPR 2020,
  https://arxiv.org/abs/1909.10788: filters are centered and standardized before their sign is taken.
"""

from typing import Literal

from torch import Tensor

from pcnn_lightning.functional.normalization import Normalization, normalize_filters
from pcnn_lightning.functional.signs import sign, sign_activation, straight_through

Scaling = Literal["layer", "channel", "none"]
WeightGradient = Literal["clip", "identity", "scaled"]


def binarize(
    weight: Tensor,
    *,
    scaling: Scaling = "channel",
    gradient: WeightGradient = "clip",
    normalization: Normalization = "none",
) -> Tensor:
    r"""Binarize kernels.

    .. math::
        V = \sqrt{\frac{2}{n}}\, \frac{C - \mu}{\sigma}, \qquad D = a\,\mathrm{sign}(V), \qquad
        a = \mathrm{mean}|V|, \qquad
        \frac{\partial L}{\partial V} = \frac{\partial L}{\partial D} \circ [\,|V| \le 1\,]

    with μ, σ and a taken over the n elements of each filter (a over the whole layer with ``scaling="layer"``). With
    ``normalization="center"``, V is C − μ, and without it, V is C. The gradient flows through μ and σ, but a is held
    constant. The papers' gradients are a times as large, in XNOR-Net with a further term
    :math:`\frac{1}{n} \frac{\partial L}{\partial D}`.

    Args:
        weight: C, (O, in, kh, kw).
        scaling: one a per output ``"channel"``, per ``"layer"``, or a = 1 (``"none"``).
        gradient: ``"clip"`` passes the gradient where \|V\| <= 1, ``"identity"`` everywhere, and ``"scaled"`` a times
            the gradient where \|V\| <= 1.
        normalization: ``"center"`` subtracts μ, ``"standardize"`` also divides by σ √(n / 2); see
            :func:`normalize_filters`.

    Returns:
        D, (O, in, kh, kw).

    Example:
        >>> weight = torch.tensor([[1.0, -3.0], [0.0, 2.0]]).reshape(2, 2, 1, 1)
        >>> binarize(weight).flatten(1)
        tensor([[ 2., -2.],
                [ 1.,  1.]])
        >>> binarize(weight, scaling="none", normalization="center").flatten(1)
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    weight = normalize_filters(weight, normalization)
    fixed = weight.detach()
    dims = (1, 2, 3) if scaling == "channel" else (0, 1, 2, 3)
    scale = 1 if scaling == "none" else fixed.abs().mean(dim=dims, keepdim=True)
    if gradient == "scaled":
        return sign_activation(weight) * scale
    return straight_through(weight if gradient == "identity" else weight.clamp(-1, 1), sign(fixed) * scale)
