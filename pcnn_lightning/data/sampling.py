"""Order and randomness as functions of (seed, epoch, sample) alone.

Neither the global random state, nor the number of workers or processes, nor an interruption has a say in what a
network sees: every random number comes from a generator made for its purpose and thrown away.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Stream(IntEnum):
    """What random numbers are for; two purposes never share a stream."""

    ORDER = 0
    AUGMENTATION = 1
    SPLIT = 2


def mixed_seed(*parts: int) -> int:
    """Hash whole numbers from 0 up, such as (seed, epoch, stream), into one seed of 64 bits.

    Sums would not do: seed 0 in epoch 1 would repeat seed 1 in epoch 0.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded by :func:`mixed_seed`."""
    return torch.Generator().manual_seed(mixed_seed(*parts))


def stratified_order(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Shuffle samples so that every prefix holds each class in its share of the whole, as nearly as it can.

    Cutting such an order anywhere splits a set in two that are both stratified.

    Args:
        labels: (N,) int64.
        rng: where the randomness comes from.

    Returns:
        (N,) int64, a permutation of 0..N-1.
    """
    shuffled = torch.randperm(len(labels), generator=rng)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    position = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    # The i-th of a class with n samples stands at (i + 1/2) / n of the way; equals are put in shuffled order.
    place = torch.empty(len(labels), dtype=torch.float64)
    place[by_class] = (position.double() + 0.5) / counts[labels[by_class]]
    return shuffled[place[shuffled].argsort(stable=True)]


class EpochSampler(DistributedSampler[int]):
    """A new permutation each epoch, drawn from (seed, epoch) and dealt out to the processes one sample at a time.

    With R processes and batches of B, the t-th batches of all processes together are the t-th batch of R * B that a
    single process would see. Being a ``DistributedSampler``, Lightning does not wrap it and calls ``set_epoch``.

    Yields *codes*, ``epoch * len(dataset) + index``, from which a data set in whichever worker process recovers both
    by ``divmod``, without shared state.

    Args:
        dataset: what is sampled from; only its length matters.
        seed: of the order, 0 or more.
        num_replicas: number of processes, R.
        rank: of this process, 0..R-1.
        drop_last: leave out the last ``len(dataset) % R`` samples of an epoch rather than repeat its first ones, so
            that all processes have equally many.
    """

    def __init__(
        self, dataset: Dataset[Any], seed: int, num_replicas: int = 1, rank: int = 0, drop_last: bool = False
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=drop_last)
        self.start = 0  # this process's samples to leave out at the beginning of the next pass

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
        order = torch.randperm(size, generator=generator(self.seed, self.epoch, Stream.ORDER))
        order = order.repeat(-(-self.total_size // size))[: self.total_size]
        codes = self.epoch * size + order[self.rank :: self.num_replicas]
        return iter(codes[self.start :].tolist())


class EpochLoader(DataLoader[Any]):
    """A DataLoader that takes up an epoch at the batch where an interrupted run left it.

    Lightning keeps ``state_dict()`` in its checkpoints and hands it to ``load_state_dict`` when it resumes.
    """

    _progress = {"epoch": 0, "batches": 0}
    _resumes = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Being a generator, this runs when the first batch is asked for. Lightning makes the iterator of a resumed
        # run before it calls set_epoch, and a plain DataLoader's workers would by then have fetched from epoch 0.
        sampler = self.sampler
        if isinstance(sampler, EpochSampler):  # not with overfit_batches, which puts a sampler of its own here
            start = self._progress["batches"] if self._resumes and self._progress["epoch"] == sampler.epoch else 0
            sampler.start = start * (self.batch_size or 1)
            self._progress = {"epoch": sampler.epoch, "batches": start}
        self._resumes = False
        for batch in super().__iter__():
            self._progress["batches"] += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return dict(self._progress)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Leave out the batches that ``state_dict`` counts, if its epoch is the next one to be run."""
        self._progress = dict(state_dict)
        self._resumes = True
