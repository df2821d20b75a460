"""The center loss against hand calculations."""

import copy
import math

import pytest
import reference
import torch

from pcnn_lightning.losses import CenterLoss


def make_loss(weight=0.4, alpha=0.5):
    """Three classes in two dimensions, with centres that are not zero."""
    loss = CenterLoss(3, 2, weight, alpha)
    loss.centers.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]))
    return loss


# Two samples of class 0, one of class 2, none of class 1.
FEATURES = torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.0, 1.0]])
LABELS = torch.tensor([0, 0, 2])

# Class 0: Σ(c - x) = (-2, -1) + (0, -2) = (-2, -3), over 1 + 2. Class 2: (-1, -2), over 1 + 1.
MOVE = {0: (2 / 3, 1.0), 1: (0.0, 0.0), 2: (0.5, 1.0)}


def moved(alpha=0.5):
    start = make_loss().centers
    return start + alpha * torch.tensor([MOVE[label] for label in range(3)])


def test_value_is_half_the_weighted_sum_of_squared_distances():
    # ‖(2, 1)‖² + ‖(0, 2)‖² + ‖(1, 2)‖² = 5 + 4 + 5
    assert make_loss(weight=0.4)(FEATURES, LABELS).item() == pytest.approx(0.4 / 2 * 14)


def test_zero_weight_gives_zero_and_still_moves_the_centers():
    loss = make_loss(weight=0.0)
    assert loss(FEATURES, LABELS).item() == 0
    loss.step()
    torch.testing.assert_close(loss.centers, moved())


def test_gradient_is_the_weighted_difference_from_the_centre():
    features = FEATURES.clone().requires_grad_()
    loss = make_loss(weight=0.4)
    loss(features, LABELS).backward()
    expected = 0.4 * torch.tensor([[2.0, 1.0], [0.0, 2.0], [1.0, 2.0]])
    torch.testing.assert_close(features.grad, expected)
    assert list(loss.parameters()) == []


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_step_moves_the_centres_as_calculated_by_hand(alpha):
    loss = make_loss(alpha=alpha)
    loss(FEATURES, LABELS)
    loss.step()
    torch.testing.assert_close(loss.centers, moved(alpha))
    assert torch.equal(loss.centers[1], make_loss().centers[1])


def test_alpha_is_a_half_by_default():
    loss = CenterLoss(3, 2, 0.1)
    loss(FEATURES, LABELS)
    loss.step()
    # From zero, class 2 moves by 0.5 · (0, 1) / 2.
    torch.testing.assert_close(loss.centers[2], torch.tensor([0.0, 0.25]))


def test_centers_move_once_per_step():
    loss = make_loss()
    before = loss.centers.clone()
    loss(FEATURES, LABELS)
    assert torch.equal(loss.centers, before)
    loss.step()
    after = loss.centers.clone()
    assert not torch.equal(after, before)
    loss.step()
    assert torch.equal(loss.centers, after)


def test_a_second_step_starts_from_the_moved_centres():
    loss = make_loss()
    loss(FEATURES, LABELS)
    loss.step()
    start = loss.centers.clone()
    loss(torch.tensor([[5.0, 5.0]]), torch.tensor([1]))
    loss.step()
    expected = start.clone()
    expected[1] -= 0.5 * (start[1] - 5) / 2
    torch.testing.assert_close(loss.centers, expected)


def test_evaluation_does_not_move_the_centers():
    loss = make_loss()
    before = loss.centers.clone()
    loss.eval()
    assert loss(FEATURES, LABELS).item() == pytest.approx(0.4 / 2 * 14)
    loss.train()
    loss.step()
    assert torch.equal(loss.centers, before)


def test_two_half_batches_equal_one_whole_batch():
    loss = make_loss()
    loss(FEATURES[:1], LABELS[:1])
    loss(FEATURES[1:], LABELS[1:])
    loss.step()
    torch.testing.assert_close(loss.centers, moved())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_a_float32_loss(dtype):
    loss = make_loss()
    features = FEATURES.to(dtype).requires_grad_()  # small integers, exact in every dtype
    value = loss(features, LABELS)
    value.backward()
    loss.step()
    assert value.dtype == loss.centers.dtype == torch.float32
    assert value.item() == pytest.approx(0.4 / 2 * 14)
    assert features.grad.dtype == dtype
    torch.testing.assert_close(loss.centers, moved())


def test_float64_features_give_a_float64_loss():
    assert make_loss()(FEATURES.double(), LABELS).dtype == torch.float64


def test_state_holds_the_centres_only_and_loads():
    loss = make_loss()
    loss(FEATURES, LABELS)
    assert loss.state_dict().keys() == {"centers"}
    loaded = CenterLoss(3, 2, 0.4)
    loaded.load_state_dict(loss.state_dict())
    assert torch.equal(loaded.centers, loss.centers)


def test_copy_made_before_the_step_moves_the_same_way():
    loss = make_loss()
    loss(FEATURES.clone().requires_grad_(), LABELS)
    twin = copy.deepcopy(loss)
    twin.step()
    torch.testing.assert_close(twin.centers, moved())
    assert torch.equal(loss.centers, make_loss().centers)


def move_centres_with_half_of_the_batch(rank):
    generator = torch.Generator().manual_seed(0)
    loss = make_loss()
    for _ in range(3):
        features, labels = torch.randn(8, 2, generator=generator), torch.tensor([0, 0, 2, 0, 2, 2, 2, 2])
        loss(features.chunk(2)[rank], labels.chunk(2)[rank])
        loss.step()
    return {"centers": loss.centers}


def test_two_processes_move_the_centres_as_one_does(tmp_path):
    both = reference.on_two_processes(move_centres_with_half_of_the_batch, tmp_path)
    generator = torch.Generator().manual_seed(0)
    loss = make_loss()
    for _ in range(3):
        loss(torch.randn(8, 2, generator=generator), torch.tensor([0, 0, 2, 0, 2, 2, 2, 2]))
        loss.step()
    for state in both:
        torch.testing.assert_close(state["centers"], loss.centers, rtol=1e-6, atol=1e-6)
    assert torch.equal(both[0]["centers"][1], make_loss().centers[1])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"num_classes": 0}, ["num_classes", "0", "at least 1"]),
        ({"feature_dim": 0}, ["feature_dim", "0", "at least 1"]),
        ({"weight": -0.5}, ["weight", "-0.5", "at least 0"]),
        ({"weight": math.nan}, ["weight", "nan", "at least 0"]),
        ({"weight": math.inf}, ["weight", "inf", "at least 0"]),
        ({"alpha": -0.5}, ["alpha", "-0.5", "[0, 1]"]),
        ({"alpha": 1.5}, ["alpha", "1.5", "[0, 1]"]),
        ({"alpha": math.nan}, ["alpha", "nan", "[0, 1]"]),
    ],
    ids=str,
)
def test_wrong_arguments_raise(arguments, parts):
    correct = {"num_classes": 3, "feature_dim": 2, "weight": 0.1, "alpha": 0.5}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked part by part
        CenterLoss(**{**correct, **arguments})
    assert all(part in str(error.value) for part in parts), str(error.value)
