"""The distillation loss, against sums written out in Python, and its term in evaluation."""

import math

import pytest
import torch

from pcnn_lightning.losses import CrossEntropy, Distillation, Outputs


def softened(logits, temperature):
    exponentials = [math.exp(logit / temperature) for logit in logits]
    return [one / sum(exponentials) for one in exponentials]


def reference(students, teachers, weight, temperature):
    """The loss and its gradient, sample by sample and class by class."""
    loss, gradient = 0.0, []
    for student, teacher in zip(students, teachers, strict=True):
        own, taught = softened(student, temperature), softened(teacher, temperature)
        loss -= sum(p * math.log(q) for p, q in zip(taught, own, strict=True))
        # d/ds_k of -Σ p log q, by the chain rule through s / T: (q_k - p_k) / T.
        gradient.append([(q - p) / temperature for p, q in zip(taught, own, strict=True)])
    scale = weight * temperature**2 / len(students)
    return scale * loss, [[scale * one for one in row] for row in gradient]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_loss_and_gradient_equal_sums_written_out(temperature, weight):
    generator = torch.Generator().manual_seed(0)
    students, teachers = 3 * torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    logits, teacher_logits = students.requires_grad_(), teachers.clone().requires_grad_()
    loss = Distillation(weight, temperature).value(Outputs(logits, logits, torch.zeros(6), [], teacher_logits))
    loss.backward()
    expected, gradient = reference(students.tolist(), teachers.tolist(), weight, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)
    assert teacher_logits.grad is None


def test_bfloat16_logits_give_a_loss_in_float32():
    logits = torch.randn(2, 4, 10).bfloat16()
    loss = Distillation(1.0, 4.0)(*logits)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, Distillation(1.0, 4.0)(*logits.float()))


def test_without_a_teacher_it_says_so():
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"needs the logits of a teacher, but there is none: load_teacher\(\)"):
        Distillation().value(Outputs(logits, logits, torch.zeros(2), []))


def test_the_weight_of_the_labels_is_for_training_only():
    term, logits, labels = CrossEntropy(weight=0.25), torch.randn(8, 4), torch.randint(4, (8,))
    outputs = Outputs(logits, logits, labels, [])
    plain = torch.nn.functional.cross_entropy(logits, labels)
    assert torch.equal(term.train().value(outputs), plain / 4)
    assert torch.equal(term.eval().value(outputs), plain)
