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

from pcnn_lightning.functional.signs import sign, sign_activation, straight_through

WeightGradient = Literal["clip", "identity", "scaled"]
Normalization = Literal["none", "center", "standardize"]


def binarize(
    weight: Tensor,
    *,
    scaling: Literal["layer", "channel", "none"] = "channel",
    gradient: WeightGradient = "clip",
    normalization: Normalization = "none",
) -> Tensor:
    r"""Binarize kernels.

    .. math::
        V = \frac{C - \mu}{\sigma}, \qquad D = a\,\mathrm{sign}(V), \qquad a = \mathrm{mean}|V|, \qquad
        \frac{\partial L}{\partial V} = \frac{\partial L}{\partial D} \circ [\,|V| \le 1\,]

    with μ, σ and a taken over each filter (a over the whole layer with ``scaling="layer"``). Without normalization, μ
    is 0 and σ is 1. The gradient flows through μ and σ, but a is held constant. The papers' gradients are a times as
    large, in XNOR-Net with a further term :math:`\frac{1}{n} \frac{\partial L}{\partial D}` for filters of n elements.

    Args:
        weight: C, (O, in, kh, kw).
        scaling: one a per output ``"channel"``, per ``"layer"``, or a = 1 (``"none"``).
        gradient: ``"clip"`` passes the gradient where \|V\| <= 1, ``"identity"`` everywhere, and ``"scaled"`` a times
            the gradient where \|V\| <= 1.
        normalization: ``"center"`` subtracts μ, ``"standardize"`` also divides by σ.

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
    filters = (1, 2, 3)
    if normalization != "none":
        weight = weight - weight.mean(dim=filters, keepdim=True)
    if normalization == "standardize":
        # A filter of equal elements is zero and stays so.
        weight = weight / weight.std(dim=filters, correction=0, keepdim=True).clamp(min=1e-12)
    fixed = weight.detach()
    dims = filters if scaling == "channel" else (0, 1, 2, 3)
    scale = 1 if scaling == "none" else fixed.abs().mean(dim=dims, keepdim=True)
    if gradient == "scaled":
        return sign_activation(weight) * scale
    return straight_through(weight if gradient == "identity" else weight.clamp(-1, 1), sign(fixed) * scale)
