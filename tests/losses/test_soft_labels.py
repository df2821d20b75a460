"""Cross-entropy and center loss of mixed labels and weighted classes, against loops in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pcnn_lightning.data.augment import mix
from pcnn_lightning.data.variations import draw_mixing
from pcnn_lightning.losses import CenterLoss, CrossEntropy, Outputs

CLASSES, BATCH, SIDES = 4, 6, (8, 8)
WEIGHTS = [0.5, 2.0, 1.0, 3.0]


def mixed(alphas: tuple[float, float]) -> tuple[Tensor, Tensor, list[list[tuple[int, float]]]]:
    """Logits, the probabilities of mixed labels, and both labels of each image with their shares."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (BATCH,), generator=rng)
    shares, boxes = draw_mixing(np.random.default_rng(0), BATCH, SIDES, *alphas)
    _, probabilities = mix(torch.zeros(BATCH, 1, *SIDES), labels, shares, boxes, CLASSES)
    pairs = []
    for b in range(BATCH):
        top, left, bottom, right = boxes[b].tolist()
        pixels = sum(top <= y < bottom and left <= x < right for y in range(SIDES[0]) for x in range(SIDES[1]))
        kept = float(shares[b]) * (1 - pixels / (SIDES[0] * SIDES[1]))
        pairs.append([(int(labels[b]), kept), (int(labels[(b - BATCH // 2) % BATCH]), 1 - kept)])
    return torch.randn(BATCH, CLASSES, generator=rng, dtype=torch.float64), probabilities.double(), pairs


def cross_entropy_slowly(
    logits: Tensor, pairs: list[list[tuple[int, float]]], smoothing: float, weights: list[float]
) -> tuple[float, Tensor]:
    """Σ_i Σ_k s_k Σ_c w_c y'_kc (-log p_ic) / Σ_i Σ_k s_k w_yk, and its gradient, sample by sample."""
    total, weight, gradient = 0.0, 0.0, torch.zeros_like(logits)
    for i, pair in enumerate(pairs):
        exponentials = [math.exp(float(logit)) for logit in logits[i]]
        p = [one / sum(exponentials) for one in exponentials]
        for label, share in pair:
            weight += share * weights[label]
            for c in range(CLASSES):
                y = weights[c] * share * ((c == label) * (1 - smoothing) + smoothing / CLASSES)
                total -= y * math.log(p[c])
                for k in range(CLASSES):
                    gradient[i, k] += y * (p[k] - (k == c))
    return total / weight, gradient / weight


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)], ids=["mixup", "cutmix", "both"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_cross_entropy_of_mixed_labels(alphas, smoothing, weights):
    logits, probabilities, pairs = mixed(alphas)
    logits.requires_grad_()
    loss = CrossEntropy(smoothing, weights).double().value(Outputs(logits, logits, probabilities, []))
    (gradient,) = torch.autograd.grad(loss, logits)
    expected, its_gradient = cross_entropy_slowly(logits.detach(), pairs, smoothing, weights or [1.0] * CLASSES)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # the shares are float32
    torch.testing.assert_close(gradient, its_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_of_plain_labels_and_in_evaluation(smoothing):
    logits = mixed((0.4, 0.0))[0]
    labels = torch.tensor([0, 1, 1, 3, 2, 3])
    outputs, pairs = Outputs(logits, logits, labels, []), [[(label, 1.0)] for label in labels.tolist()]
    term = CrossEntropy(smoothing, WEIGHTS).double()
    assert term.value(outputs).item() == pytest.approx(cross_entropy_slowly(logits, pairs, smoothing, WEIGHTS)[0])
    hot = outputs._replace(labels=torch.eye(CLASSES).double()[labels])
    assert term.value(hot).item() == pytest.approx(term.value(outputs).item(), rel=1e-12)
    plain = cross_entropy_slowly(logits, pairs, 0.0, [1.0] * CLASSES)[0]
    assert term.eval().value(outputs).item() == pytest.approx(plain)
    assert not term.state_dict()


def test_balanced_weights():
    term = CrossEntropy(0.0, [1.0] * 3)
    term.balance([10, 40, 50])
    assert term.class_weights.tolist() == pytest.approx([100 / 30, 100 / 120, 100 / 150])


def test_center_loss_of_mixed_labels():
    """The mean of the losses for both labels, by hand; and centers that move by the shares."""
    _, probabilities, pairs = mixed((0.4, 1.0))
    loss = CenterLoss(CLASSES, 3, 0.4, 0.5).double()
    loss.centers.copy_(torch.randn(CLASSES, 3, dtype=torch.float64))
    features = torch.randn(BATCH, 3, dtype=torch.float64, requires_grad=True)
    value = loss(features, probabilities)
    (gradient,) = torch.autograd.grad(value, features)
    expected, its_gradient = 0.0, torch.zeros(BATCH, 3, dtype=torch.float64)
    moves, counts = torch.zeros(CLASSES, 3, dtype=torch.float64), torch.zeros(CLASSES, 1, dtype=torch.float64)
    for x, pair, row in zip(features.detach(), pairs, its_gradient, strict=True):
        for label, share in pair:
            expected += 0.2 * share * (x - loss.centers[label]).square().sum().item()
            row += 0.4 * share * (x - loss.centers[label])
            moves[label] += share * (loss.centers[label] - x)
            counts[label] += share
    assert value.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, its_gradient, rtol=1e-5, atol=1e-7)
    after = loss.centers - 0.5 * moves / (1 + counts)
    loss.step()
    torch.testing.assert_close(loss.centers, after, rtol=1e-5, atol=1e-7)
