"""1-bit activations."""

from collections import OrderedDict
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcnn_lightning.checks import check_choice, check_integer
from pcnn_lightning.errors import InputError
from pcnn_lightning.functional import SignGradient, sign_activation
from pcnn_lightning.layers.batch_norm import FrozenBatchNorm2d

MOST_OF_ONE_SIGN = 0.98
"""Share of equal signs above which a layer has next to nothing to learn from."""


class SignActivation(nn.Module):
    """Binarize activations to -1 and +1; see :func:`pcnn_lightning.functional.sign_activation`.

    With ``threshold``, the sign is that of x - t with a learned t for each channel, as in ReActNet (Liu et al., ECCV
    2020, https://arxiv.org/abs/2003.03488). It starts as the mean of each channel over the first batch in training,
    over all processes, so that inputs without negative values, as a ReLU leaves them, have both signs as well.

    Args:
        gradient: ``"clip"`` passes the gradient where abs(x - t) <= 1, ``"polynomial"`` is the estimator of Bi-Real
            Net.
        threshold: number of channels, each with a threshold; None for t = 0.
        name: what errors call the layer.

    Attributes:
        enabled: False passes x on as it is, as in a stage of training with real activations.
        replaces_relu: whether the layer stands in the place of a ReLU, which it is while it is not enabled.
        threshold: t, (channels,); None without thresholds.
        is_set: 1 if a batch has set the thresholds, else 0; averaged weights have a value in between.

    Raises:
        ValueError: if ``gradient`` is neither, or ``threshold`` is no positive integer.
        InputError: in the first batch, if more than 98 % of the signs are equal.
    """

    is_set: Tensor
    replaces_relu = False

    def __init__(self, gradient: SignGradient = "clip", threshold: int | None = None, name: str = "") -> None:
        super().__init__()
        check_choice("gradient", gradient, get_args(SignGradient))
        self.gradient, self.name, self.enabled = gradient, name, True
        self.threshold: nn.Parameter | None = None
        if threshold is not None:
            check_integer("threshold", threshold, 1)
            self.threshold = nn.Parameter(torch.zeros(threshold))
            self.register_buffer("is_set", torch.tensor(0.0))  # a float, so that it can be averaged
        self._is_ready = False  # known without a look at the buffer, for which a GPU would have to be waited for

    def forward(self, x: Tensor) -> Tensor:
        """Signs of x, (B, C, H, W)."""
        if not self.enabled:
            # A parameter without a gradient would make DDP wait for it.
            x = x if self.threshold is None else x + 0 * self.threshold[:, None, None]
            return F.relu(x) if self.replaces_relu else x
        if self.threshold is None:
            return sign_activation(x, self.gradient)
        if self.training and not self._is_ready:
            self._prepare(x)
        return sign_activation(x - self.threshold[:, None, None], self.gradient)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _prepare(self, x: Tensor) -> None:
        """Set the thresholds, unless a checkpoint has them."""
        assert self.threshold is not None
        if not self.is_set:
            means = x.to(torch.promote_types(x.dtype, torch.float32)).mean(dim=(0, 2, 3))
            self.threshold.copy_(_over_processes(means))
            self._check(x - self.threshold[:, None, None])
            self.is_set.fill_(1)
        self._is_ready = True

    def _check(self, x: Tensor) -> None:
        positive = float(_over_processes((x >= 0).float().mean()))
        if (most := max(positive, 1 - positive)) > MOST_OF_ONE_SIGN:
            raise InputError(
                f"{self.name or 'SignActivation'}: {most:.1%} of its inputs have the same sign, from which it cannot "
                "learn: leave its activations real or, in a conversion, exclude it"
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_ready = False

    @torch.no_grad()
    def frozen(self) -> nn.Module:
        """The thresholds as the shift of a batch norm, in front of a sign without: what all runtimes know."""
        assert self.threshold is not None
        norm = FrozenBatchNorm2d(len(self.threshold)).to(self.threshold)
        norm.shift = -self.threshold.detach()
        return nn.Sequential(OrderedDict(norm=norm, sign=SignActivation(self.gradient)))

    def extra_repr(self) -> str:
        channels = "" if self.threshold is None else f", threshold={len(self.threshold)}"
        return f"gradient={self.gradient!r}{channels}"


def _over_processes(values: Tensor) -> Tensor:
    """The mean of ``values`` over all processes, of which each has as many images."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values
