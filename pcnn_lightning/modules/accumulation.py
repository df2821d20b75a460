"""Gradient accumulation: the batches of an update."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from lightning.pytorch import Trainer
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Update:
    """Place of a batch among the updates of an epoch.

    Attributes:
        index: of the update within the epoch.
        position: of the batch within the update.
        size: number of batches in the update; the last update of an epoch may be smaller.
    """

    index: int
    position: int
    size: int

    @property
    def is_complete(self) -> bool:
        """Whether this batch is the last one of the update."""
        return self.position == self.size - 1


def update_of(batch_idx: int, accumulate: int, batches: float) -> Update:
    """The update that a batch belongs to, of an epoch of ``batches``."""
    index, position = divmod(batch_idx, accumulate)
    return Update(index, position, int(min(accumulate, batches - index * accumulate)))


def synced_only_if(complete: bool, trainer: Trainer) -> AbstractContextManager[None]:
    """Let DDP average gradients over processes only with the last batch of an update."""
    model = trainer.strategy.model
    return model.no_sync() if not complete and isinstance(model, DistributedDataParallel) else nullcontext()
