"""1-bit activations."""

from typing import get_args

from torch import Tensor, nn

from pcnn_lightning.checks import check_choice
from pcnn_lightning.functional import SignGradient, sign_activation


class SignActivation(nn.Module):
    """Binarize activations to -1 and +1; see :func:`pcnn_lightning.functional.sign_activation`.

    Args:
        gradient: ``"clip"`` passes the gradient where abs(x) <= 1, ``"polynomial"`` is the estimator of Bi-Real Net.

    Raises:
        ValueError: if ``gradient`` is neither.
    """

    def __init__(self, gradient: SignGradient = "clip") -> None:
        super().__init__()
        check_choice("gradient", gradient, get_args(SignGradient))
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        return sign_activation(x, self.gradient)

    def extra_repr(self) -> str:
        return f"gradient={self.gradient!r}"
