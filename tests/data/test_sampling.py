"""Order and randomness depend on (seed, epoch, sample) alone."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcnn_lightning.data.datasets import Augmentation, MemoryImages, RawBatch
from pcnn_lightning.data.sampling import (
    EpochLoader,
    EpochSampler,
    generator,
    mixed_seed,
    stratified_order,
)
from pcnn_lightning.errors import InputError


def numbered(size: int, augmentation: Augmentation | None = None) -> MemoryImages:
    """Images whose label is their index."""
    images = torch.randint(0, 256, (size, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return MemoryImages(images=images, labels=torch.arange(size), augmentation=augmentation)


def epoch_of(loader: EpochLoader, epoch: int) -> list[RawBatch]:
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def loader_of(size: int, batch_size: int, num_workers: int = 0, seed: int = 0, **sampling: Any) -> EpochLoader:
    images = numbered(size, Augmentation(seed, 4, True, random_erasing=0.5, mixup_alpha=1.0, cutmix_alpha=1.0))
    if sampling.pop("weighted", False):
        sampling["labels"] = torch.arange(size) % 3
    sampler = EpochSampler(images, seed, **sampling)
    options: dict[str, Any] = {
        "collate_fn": as_it_is,
        "generator": torch.Generator(),
        "persistent_workers": num_workers > 0,
    }
    return EpochLoader(images, batch_size, sampler=sampler, num_workers=num_workers, **options)


def as_it_is(batch: RawBatch) -> RawBatch:
    return batch


def assert_same(batches: list[RawBatch], others: list[RawBatch]) -> None:
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        for mine, its in zip(batch, other, strict=True):
            assert mine is not None
            assert its is not None
            assert torch.equal(mine, its)


def test_seeds_do_not_collide():
    seeds = {mixed_seed(seed, epoch, stream) for seed in range(20) for epoch in range(20) for stream in range(3)}
    assert len(seeds) == 20 * 20 * 3
    assert all(0 <= seed < 2**64 for seed in seeds)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 100), cut=st.floats(0, 1))
def test_every_prefix_of_a_stratified_order_is_balanced(labels, seed, cut):
    order = stratified_order(torch.tensor(labels), generator(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    prefix = order[: round(cut * len(labels))]
    found, whole = Counter(torch.tensor(labels)[prefix].tolist()), Counter(labels)
    for label, count in whole.items():
        assert abs(found[label] - count * len(prefix) / len(labels)) <= 1 + len(whole) / 2


def test_stratified_order_is_exact_for_equal_classes_and_differs_by_seed():
    labels = torch.arange(5).repeat(20)
    orders = [stratified_order(labels, generator(seed)) for seed in (0, 0, 1)]
    assert labels[orders[0][:10]].bincount().tolist() == [2] * 5
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_each_sample_is_seen_once_an_epoch(size, num_replicas):
    images = numbered(size)
    samplers = [EpochSampler(images, 0, num_replicas, rank) for rank in range(num_replicas)]
    for sampler in samplers:
        sampler.set_epoch(3)
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])} == {-(-size // num_replicas)}
    codes = [code for dealt in zip(*shares, strict=True) for code in dealt]
    assert sorted(codes[:size]) == list(range(3 * size, 4 * size))
    assert set(codes[size:]) <= set(codes[:size]), "what does not come out even is filled up with samples of the epoch"


def test_dropping_the_last_samples_repeats_none():
    images = numbered(7)
    codes = [code for rank in range(2) for code in EpochSampler(images, 0, 2, rank, drop_last=True)]
    assert len(codes) == len(set(codes)) == 6


def test_order_and_augmentation_change_with_epoch_and_seed():
    loader = loader_of(64, 64)
    (batch,) = epoch_of(loader, 0)
    labels, offsets, flips = batch.labels, batch.offsets, batch.flips
    assert torch.equal(batch.images, loader.dataset.images[labels])
    assert 0 <= int(offsets.min()) < int(offsets.max()) <= 8
    assert 0 < int(flips.sum()) < 64
    for other in (epoch_of(loader, 1), epoch_of(loader_of(64, 64, seed=1), 0)):
        order = other[0].labels.argsort()
        assert not torch.equal(labels, other[0].labels)
        for mine, its in zip(batch[2:], other[0][2:], strict=True):
            assert not torch.equal(mine[labels.argsort()], its[order])


def test_workers_and_earlier_epochs_change_nothing():
    loader, with_workers = loader_of(20, 4), loader_of(20, 4, num_workers=2)
    for epoch in (0, 1, 3):
        expected = epoch_of(loader, epoch)
        assert_same(epoch_of(with_workers, epoch), expected)
    assert_same(epoch_of(loader_of(20, 4), 3), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_two_processes_see_the_batches_of_one(weighted):
    together = epoch_of(loader_of(24, 8, weighted=weighted), 2)
    shares = [loader_of(24, 4, num_replicas=2, rank=rank, weighted=weighted) for rank in range(2)]
    first, second = (epoch_of(share, 2) for share in shares)
    united = [
        RawBatch(*(torch.stack([mine, its], 1).flatten(0, 1) for mine, its in zip(batch, other, strict=True)))
        for batch, other in zip(first, second, strict=True)
    ]
    assert_same(united, together)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_random_state_is_neither_read_nor_changed(num_workers):
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        runs.append(epoch_of(loader_of(20, 4, num_workers), 0))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same(*runs)


@pytest.mark.parametrize(("num_workers", "weighted"), [(0, False), (2, False), (2, True)])
def test_an_interrupted_epoch_is_taken_up_where_it_stopped(num_workers, weighted):
    whole = [epoch_of(loader_of(20, 4, weighted=weighted), epoch) for epoch in range(3)]
    interrupted = loader_of(20, 4, num_workers, weighted=weighted)
    interrupted.sampler.set_epoch(1)
    batches = iter(interrupted)
    assert_same([next(batches), next(batches)], whole[1][:2])
    state = interrupted.state_dict()
    resumed = loader_of(20, 4, num_workers, weighted=weighted)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert_same(epoch_of(resumed, 1), whole[1][2:])
    place = {"images": 20, "labels": 0, "seed": 0, "global_batch": 4, "weighted": weighted}
    assert resumed.state_dict() == {"epoch": 1, "batches": 5, **place}
    assert_same(epoch_of(resumed, 1), whole[1])  # only once
    assert_same(epoch_of(resumed, 2), whole[2])


def interrupted_state(epoch: int = 1, batches: int = 2) -> dict[str, int]:
    """Two batches of an epoch of 20 images in batches of 4."""
    loader = loader_of(20, 4)
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    return loader.state_dict()


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"batch_size": 2}, "batch_size × processes must be 4, but got 2"),
        ({"num_replicas": 2}, "batch_size × processes must be 4, but got 8"),
        ({"size": 24}, "the number of training images must be 20, but got 24"),
        ({"seed": 3}, "seed must be 0, but got 3"),
        ({"weighted": True}, "weighted_sampling must be False, but got True"),
        ({"size": 8, "seed": 3}, "the number of training images must be 20, but got 8, and seed must be 0, but got 3"),
    ],
)
def test_within_an_epoch_nothing_may_change_that_the_order_depends_on(now, message):
    resumed = loader_of(**{"size": 20, "batch_size": 4, **now})
    resumed.load_state_dict(interrupted_state())
    with pytest.raises(InputError, match=f"^To resume within epoch 1, {message}: set it back, or resume from"):
        epoch_of(resumed, 1)
    resumed.load_state_dict(interrupted_state())
    assert_same(epoch_of(resumed, 2), epoch_of(loader_of(**{"size": 20, "batch_size": 4, **now}), 2))


def test_batches_may_be_dealt_out_to_other_processes_and_older_checkpoints_do_not_say():
    whole = epoch_of(loader_of(20, 4), 1)
    old = {name: value for name, value in interrupted_state().items() if name in ("epoch", "batches")}
    for state in (interrupted_state(), old):
        shares = []
        for rank in range(2):
            loader = loader_of(20, 2, num_replicas=2, rank=rank)
            loader.load_state_dict(state)
            shares.append(torch.cat([batch.labels for batch in epoch_of(loader, 1)]))
        assert torch.equal(torch.stack(shares, 1).flatten(), torch.cat([batch.labels for batch in whole[2:]]))


def test_the_loop_of_lightning_may_be_in_an_epoch_when_the_state_is_not():
    resumed = loader_of(20, 2)
    resumed.load_state_dict(interrupted_state(batches=5))
    resumed.loop = SimpleNamespace(ready=5)
    with pytest.raises(InputError, match="To resume within epoch 1, batch_size × processes must be 4, but got 2"):
        epoch_of(resumed, 2)


def test_a_finished_epoch_leaves_nothing_out_of_the_next():
    finished, resumed = loader_of(20, 4), loader_of(20, 4)
    epoch_of(finished, 0)
    resumed.load_state_dict(finished.state_dict())
    assert_same(epoch_of(resumed, 1), epoch_of(finished, 1))


def test_selections_of_selections_share_the_pixels():
    images = numbered(10)
    chosen = images.select(torch.tensor([8, 6, 4, 2])).select(torch.tensor([3, 0]))
    batch = chosen.__getitems__([0, 1])
    assert chosen.images is images.images
    assert batch.labels.tolist() == [2, 8]
    assert torch.equal(batch.images, images.images[[2, 8]])
    assert chosen.unlabelled().__getitems__([1]).labels is None
