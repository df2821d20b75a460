"""Knowledge distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcnn_lightning.checks import check_number, check_positive
from pcnn_lightning.losses.term import LossTerm, Outputs


class Distillation(LossTerm):
    r"""Cross-entropy of the logits with the softened predictions of a teacher (Hinton et al., 2015).

    .. math::
        L_D = -\frac{w T^2}{B} \sum_i \sum_k p_k(t_i / T) \log p_k(s_i / T),
        \qquad
        p(z) = \mathrm{softmax}(z)

    s are the logits of the network and t those of its teacher, through which no gradient flows
    (https://arxiv.org/abs/1503.02531). The gradient of the soft cross-entropy shrinks as 1/T², which the factor T²
    makes up for: w means the same at any temperature. The gradient is that of T² times the Kullback-Leibler divergence
    from the teacher's predictions; the value is larger by the teacher's entropy, so that it does not fall to zero.

    It is a term of training only.

    Args:
        weight: w.
        temperature: T; higher ones show more of how the teacher ranks the wrong classes.
        start: the first epoch, or the first stage, in which it is part of the loss.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.

    Example:
        >>> distillation = Distillation(temperature=2.0)
        >>> logits = torch.zeros(1, 4)
        >>> distillation(logits, teacher_logits=torch.tensor([[3.0, 0.0, 0.0, 1.0]]))  # 2² log 4, whatever it teaches
        tensor(5.5452)
    """

    label = "distill loss"
    in_evaluation = False
    training_only = True

    def __init__(self, weight: float = 1.0, temperature: float = 1.0, start: int | str = 0) -> None:
        super().__init__(start)
        check_number("weight", weight, 0)
        check_positive("temperature", temperature)
        self.weight, self.temperature = weight, temperature

    def value(self, outputs: Outputs, batches: int = 1) -> Tensor:
        if outputs.teacher_logits is None:
            raise ValueError("the distillation loss needs the logits of a teacher, but there is none: load_teacher()")
        loss: Tensor = self(outputs.logits, outputs.teacher_logits)
        return loss

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Loss of ``logits`` (B, num_classes) with ``teacher_logits`` (B, num_classes): a scalar, at least float32."""
        precise = torch.promote_types(logits.dtype, torch.float32)
        targets = (teacher_logits.detach().to(precise) / self.temperature).softmax(dim=1)
        factor = self.weight * self.temperature**2
        return factor * F.cross_entropy(logits.to(precise) / self.temperature, targets)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, temperature={self.temperature}"
