"""Sample order and random numbers that depend on (seed, epoch, sample) alone.

The global random state, the number of workers or processes and interruptions do not affect what a network sees: all
random numbers come from single-use generators.
"""

from collections.abc import Iterator
from enum import IntEnum
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pcnn_lightning.errors import InputError


class Stream(IntEnum):
    """Purpose of random numbers; different purposes never share a stream."""

    ORDER = 0
    AUGMENTATION = 1
    SPLIT = 2
    ERASING = 3
    MIXING = 4


def mixed_seed(*parts: int) -> int:
    """Hash non-negative integers, such as (seed, epoch, stream), to one 64-bit seed.

    A sum would not work: seed 0 in epoch 1 would repeat seed 1 in epoch 0.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def generator(*parts: int) -> torch.Generator:
    """Create a CPU generator seeded by :func:`mixed_seed`."""
    return torch.Generator().manual_seed(mixed_seed(*parts))


def numpy_generator(*parts: int) -> np.random.Generator:
    """Create a generator of NumPy, which draws what torch cannot draw from a generator of one's own, such as Beta."""
    return np.random.default_rng(mixed_seed(*parts))


def stratified_order(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Shuffle samples such that every prefix has the class proportions of the whole, as closely as possible.

    Splitting this order at any position yields two stratified subsets.

    Args:
        labels: (N,) int64.
        rng: random number generator.

    Returns:
        (N,) int64, a permutation of 0..N-1.
    """
    shuffled = torch.randperm(len(labels), generator=rng)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    position = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    # The i-th sample of a class with n samples is placed at (i + 1/2) / n; ties stay in shuffled order.
    place = torch.empty(len(labels), dtype=torch.float64)
    place[by_class] = (position.double() + 0.5) / counts[labels[by_class]]
    return shuffled[place[shuffled].argsort(stable=True)]


def balanced_order(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Draw as many samples as there are, with replacement, so that each draw is of each class equally likely.

    Sample i has the probability 1 / (C · n) in each draw: C classes have samples, and n of these are of its class.

    Args:
        labels: (N,) int64.
        rng: random number generator.

    Returns:
        (N,) int64, indices of samples.
    """
    counts = labels.bincount()
    present = counts.nonzero().flatten()
    classes = present[torch.randint(len(present), labels.shape, generator=rng)]
    within = (torch.rand(len(labels), generator=rng, dtype=torch.float64) * counts[classes]).long()
    return labels.argsort(stable=True)[(counts.cumsum(0) - counts)[classes] + within]


EPOCHS = 2**15
"""Epochs that codes tell apart beside the variations of an image."""


def encode(epoch: int, indices: Tensor, variations: Tensor, size: int) -> Tensor:
    """Encode samples and their augmentation as one integer each: *codes*, for a dataset in any worker process.

    A code is ``epoch * size + index`` if a sample has the variation of its own index. It is that of another epoch if
    not, so that ``divmod(code, size)`` always yields a key of the augmentation and the index.

    Args:
        epoch: the epoch.
        indices: (n,) int64, indices of samples.
        variations: (n,) int64, the place of each one's augmentation among the ``size`` of an epoch.
        size: number of samples in the dataset, below 2^24.
    """
    return ((variations - indices) % size * EPOCHS + epoch) * size + indices


def decode(codes: Tensor, size: int) -> tuple[int, Tensor, Tensor]:
    """The epoch, indices and variations of :func:`encode`; all codes are of one epoch."""
    keys, indices = codes // size, codes % size
    return int(keys[0]) % EPOCHS, indices, (indices + keys // EPOCHS) % size


class EpochSampler(DistributedSampler[int]):
    """Sampler with a new order per (seed, epoch), distributed over the processes one sample at a time.

    With R processes and a batch size of B, the t-th batches of all processes together are the t-th batch of a single
    process with a batch size of R * B. Because this is a ``DistributedSampler``, Lightning does not wrap it and calls
    its ``set_epoch``.

    Yields codes, see :func:`encode`, from which a dataset in any worker process recovers epoch and index without shared
    state.

    Args:
        dataset: dataset to sample from; only its length matters.
        seed: seed of the order; at least 0.
        num_replicas: R, number of processes.
        rank: rank of this process, 0..R-1.
        drop_last: to give all processes the same number of samples, drop the last ``len(dataset) % R`` samples of an
            epoch instead of repeating the first ones.
        labels: (N,) int64, to draw by :func:`balanced_order`; each draw of an image then has an augmentation of its
            own. None yields a permutation.

    Raises:
        InputError: if there are too many samples to draw from.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=drop_last)
        if labels is not None and len(labels) >= 2**24:  # codes would not fit into 64 bits
            raise InputError(f"weighted_sampling takes fewer than 2^24 training images, but got {len(labels):,}")
        self.labels = labels
        self.start = 0  # number of this process's samples to skip in the next pass

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
        rng = generator(self.seed, self.epoch, Stream.ORDER)
        if self.labels is None:
            order = variations = torch.randperm(size, generator=rng)
        else:
            order, variations = balanced_order(self.labels, rng), torch.arange(size)
        codes = encode(self.epoch, order, variations, size)
        codes = codes.repeat(-(-self.total_size // size))[: self.total_size]
        return iter(codes[self.rank :: self.num_replicas][self.start :].tolist())


class EpochLoader(DataLoader[Any]):
    """DataLoader that continues an epoch at the batch where a run was interrupted.

    Lightning saves ``state_dict()`` in checkpoints and passes it to ``load_state_dict`` when it resumes a run.

    Raises:
        InputError: when the first batch is requested of a run resumed within an epoch, if the images, the seed, the
            batch size of all processes together or the kind of sampling has changed.
    """

    loop: Any = None
    """Lightning's progress within the epoch. Resumed after the last batch of an epoch, Lightning carries its count of
    batches over to the next epoch if that has more of them."""
    checksum = 0
    """Of the labels, by which other images of the same number are told."""
    _progress = {"epoch": 0, "batches": 0}
    _resumes = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # This is a generator, so it runs only when the first batch is requested. When resuming, Lightning creates the
        # iterator before it calls set_epoch; a plain DataLoader's workers would already have fetched from epoch 0.
        sampler = self.sampler
        resumes, self._resumes = self._resumes, False
        if not isinstance(sampler, EpochSampler):  # overfit_batches replaces the sampler by one of a fixed order
            yield from islice(super().__iter__(), self.loop.ready if resumes and self.loop else 0, None)
            return
        saved = self._progress if resumes else {}
        place = {
            "images": len(sampler.dataset),  # type: ignore[arg-type]  # torch's Dataset declares no __len__
            "labels": self.checksum,
            "seed": sampler.seed,
            "global_batch": (self.batch_size or 1) * sampler.num_replicas,
            "weighted": sampler.labels is not None,
        }
        start = saved["batches"] if saved.get("epoch") == sampler.epoch else 0
        if start > 0 or (self.loop and self.loop.ready > 0):
            _require_same(saved, place)
        sampler.start = start * (self.batch_size or 1)
        self._progress = {"epoch": sampler.epoch, "batches": start, **place}
        for batch in super().__iter__():
            self._progress["batches"] += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the current epoch, the number of batches it has yielded, and what these batches depend on.

        That is ``images``, the number of images; ``labels``, their checksum; ``seed``; ``global_batch``, the batch size
        of all processes together; and ``weighted``, whether classes are drawn equally often. They are missing before
        the first batch.
        """
        return dict(self._progress)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Skip the batches counted in ``state_dict`` if the next epoch is the one it was saved in."""
        self._progress = dict(state_dict)
        self._resumes = True


def _require_same(saved: dict[str, int], place: dict[str, int]) -> None:
    names = {
        "images": "the number of training images",
        "seed": "seed",
        "global_batch": "batch_size × processes",
        "weighted": "weighted_sampling",
    }
    changes = [
        f"{name} must be {saved[key]}, but got {place[key]}"
        for key, name in names.items()
        if saved.get(key, place[key]) != place[key]  # older checkpoints do not have it
    ]
    if not changes and saved.get("labels", place["labels"]) != place["labels"]:
        changes = ["the training images must be the same, but these have other labels"]
    if changes:
        raise InputError(
            f"To resume within epoch {saved['epoch']}, {', and '.join(changes)}: "
            "set it back, or resume from a checkpoint saved between epochs"
        )
