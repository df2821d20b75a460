"""Random erasing, mixup and cutmix against loops over pixels and the draws of torchvision."""

import numpy as np
import pytest
import torch
from made_images import make_folder
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import v2

from pcnn_lightning.data import Digits, ImageFolder
from pcnn_lightning.data.augment import erase, mix
from pcnn_lightning.data.variations import draw_erased, draw_mixing

EVERYTHING = {"random_erasing": 0.5, "mixup_alpha": 0.4, "cutmix_alpha": 1.0}
SIDES = (12, 9)


def mix_slowly(
    images: Tensor, labels: Tensor, shares: Tensor, boxes: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Pixel by pixel, in float64."""
    batch, channels, height, width = images.shape
    mixed = torch.empty(images.shape, dtype=torch.float64)
    probabilities = torch.zeros(batch, num_classes, dtype=torch.float64)
    for b in range(batch):
        partner = (b - batch // 2) % batch
        top, left, bottom, right = boxes[b].tolist()
        kept = 0.0
        for y in range(height):
            for x in range(width):
                share = 0.0 if top <= y < bottom and left <= x < right else float(shares[b])
                kept += share / (height * width)
                for c in range(channels):
                    mixed[b, c, y, x] = share * images[b, c, y, x] + (1 - share) * images[partner, c, y, x]
        probabilities[b, labels[b]] += kept
        probabilities[b, labels[partner]] += 1 - kept
    return mixed, probabilities


@pytest.mark.parametrize("batch", [1, 6, 7])
@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)], ids=["mixup", "cutmix", "both"])
def test_mixing_equals_the_loop(batch, alphas):
    images = torch.randn(batch, 2, *SIDES, dtype=torch.float64)
    labels = torch.randint(5, (batch,))
    shares, boxes = draw_mixing(np.random.default_rng(0), batch, SIDES, *alphas)
    expected = mix_slowly(images, labels, shares, boxes, 5)
    for found, wanted in zip(mix(images, labels, shares, boxes, 5), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)  # shares are float32
    if alphas[0] == 0:
        exact = mix(images, labels, shares, boxes, 5)[0]
        assert torch.equal(exact, expected[0]), "cutmix moves pixels and does not change them"


def test_erasing_equals_the_loop():
    images = torch.randn(20, 2, *SIDES)
    boxes = draw_erased(np.random.default_rng(0), 20, SIDES, 0.7)
    expected = images.clone()
    for b, (top, left, bottom, right) in enumerate(boxes.tolist()):
        expected[b, :, top:bottom, left:right] = 0
    assert torch.equal(erase(images, boxes), expected)
    assert 0 < (boxes[:, 2] > boxes[:, 0]).sum() < 20


def torchvision_draws(transform: v2.Transform, names: list[str], count: int = 1500) -> np.ndarray:
    torch.manual_seed(0)
    image = torch.zeros(1, *SIDES)
    drawn = (transform.make_params([image]) for _ in range(count))
    return np.array([np.hstack([np.asarray(one[name], float) for name in names]) for one in drawn])


def test_draws_are_distributed_as_those_of_torchvision():
    rng, count = np.random.default_rng(0), 6000
    shares, boxes = draw_mixing(rng, count, SIDES, 0.4, 0.0)
    assert not boxes.any()
    pairs = [(shares[:, None].numpy(), torchvision_draws(v2.MixUp(alpha=0.4, num_classes=2), ["lam"]))]
    shares, boxes = draw_mixing(rng, count, SIDES, 0.0, 0.7)
    assert (shares == 1).all()
    theirs = torchvision_draws(v2.CutMix(alpha=0.7, num_classes=2), ["box"])[:, [1, 0, 3, 2]]  # x comes first
    pairs.append((boxes.numpy(), theirs))
    erased = draw_erased(rng, count, SIDES, 1.0)
    assert (erased[:, 2:] > erased[:, :2]).all()
    theirs = torchvision_draws(v2.RandomErasing(p=1.0), ["i", "j", "h", "w"])
    theirs[:, 2:] += theirs[:, :2]
    pairs.append((erased.numpy(), theirs))
    for ours, its in pairs:
        # The areas of boxes as well as their borders.
        columns = [ours, its] if ours.shape[1] == 1 else [np.c_[b, (b[:, 2:] - b[:, :2]).prod(1)] for b in (ours, its)]
        for mine, other in zip(columns[0].T, columns[1].T, strict=True):
            assert ks_2samp(mine, other).pvalue > 1e-3


def test_with_both_half_of_the_images_are_mixed_by_each():
    shares, boxes = draw_mixing(np.random.default_rng(0), 4000, SIDES, 1.0, 1.0)
    cuts = (shares == 1).double().mean()
    assert abs(cuts - 0.5) < 4 * (0.25 / 4000) ** 0.5
    assert not boxes[shares < 1].any()


def batches_of(data: Digits | ImageFolder, epoch: int = 1) -> list[tuple[Tensor, ...]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [tuple(data.on_after_batch_transfer(batch, 0)) for batch in loader]


@pytest.mark.parametrize("weighted", [False, True])
def test_images_from_disk_do_not_depend_on_the_workers(tmp_path, weighted):
    root = make_folder(tmp_path, {"train": {"a": 12, "b": 4}}, size=(20, 30))
    options = {"image_size": 16, "in_memory": False, "batch_size": 4, "val_fraction": 0.0}
    sets = [
        ImageFolder(str(root), num_workers=workers, weighted_sampling=weighted, **options, **EVERYTHING)  # type: ignore[arg-type]
        for workers in (0, 2)
    ]
    alone, others = (batches_of(data) for data in sets)
    for batch, other in zip(alone, others, strict=True):
        assert batch[1].shape == (4, 2)
        assert all(torch.equal(mine, its) for mine, its in zip(batch, other, strict=True))
    assert not torch.equal(alone[0][0], batches_of(sets[0], epoch=2)[0][0])


def test_validation_and_test_images_are_left_alone():
    data = Digits(batch_size=8, train_size=40, **EVERYTHING)  # type: ignore[arg-type]
    plain = Digits(batch_size=8, train_size=40)
    for name in ("val_dataloader", "test_dataloader"):
        found, expected = (one.on_after_batch_transfer(next(iter(getattr(one, name)())), 0) for one in (data, plain))
        assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))


def test_probabilities_are_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        images, labels = batches_of(Digits(batch_size=8, train_size=40, **EVERYTHING))[0]  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(torch.float32)
    assert images.dtype == labels.dtype == torch.float32
    torch.testing.assert_close(labels.sum(1), torch.ones(8))


@pytest.mark.gpu
def test_the_device_is_never_waited_for():
    data = Digits(batch_size=64, train_size=64, **EVERYTHING)  # type: ignore[arg-type]
    raw = next(iter(data.train_dataloader()))
    on_device = type(raw)(*(part.cuda() for part in raw))
    expected = data.on_after_batch_transfer(raw, 0)
    data.on_after_batch_transfer(on_device, 0)  # mean and standard deviation are moved once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = data.on_after_batch_transfer(on_device, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), its.cpu())
