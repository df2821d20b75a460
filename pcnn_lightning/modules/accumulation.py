"""Gradient accumulation: the batches of an update."""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pcnn_lightning.errors import InputError
from pcnn_lightning.losses import LossTerm


def check_accumulation(accumulate: int, trainer: Trainer, terms: Mapping[str, LossTerm]) -> None:
    """Refuse what cannot be accumulated over an epoch.

    Raises:
        InputError: if the length of the data is unknown, and a term is a sum, which cannot be weighted before the
            update is over, or ``limit_train_batches`` keeps the trainer from seeing the end.
    """
    batches = trainer.num_training_batches
    if accumulate > 1 and math.isfinite(batches) and sized_len(trainer.train_dataloader) is None:
        raise InputError(
            f"accumulate must be 1 for data of unknown length with limit_train_batches={batches}, but got "
            f"{accumulate}: leave out the limit, with which the end of an epoch is not seen in time"
        )
    if accumulate > 1 and math.isinf(batches):
        for name in (name for name, term in terms.items() if term.sums_over_update):
            raise InputError(
                f"accumulate must be 1 for {name} and data of unknown length, but got {accumulate}: "
                "the size of the last update of an epoch is not known before its end"
            )


@dataclass(frozen=True)
class Update:
    """Place of a batch among the updates of an epoch.

    Attributes:
        index: of the update within the epoch.
        position: of the batch within the update.
        size: number of batches in the update; the last update of an epoch may be smaller.
        is_last: whether the batch is the last one of the epoch.
    """

    index: int
    position: int
    size: int
    is_last: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether this batch is the last one of the update."""
        return self.position == self.size - 1 or self.is_last

    def rescale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over the batches that there were, if the data ended before ``size``."""
        batches = self.position + 1
        for parameter in parameters if batches < self.size else ():
            if parameter.grad is not None:
                parameter.grad *= self.size / batches


def update_of(batch_idx: int, accumulate: int, batches: float, is_last: bool = False) -> Update:
    """The update that a batch belongs to, of an epoch of ``batches``, which is infinite if it is not known."""
    index, position = divmod(batch_idx, accumulate)
    return Update(index, position, int(min(accumulate, batches - index * accumulate)), is_last)


def synced_only_if(complete: bool, trainer: Trainer) -> AbstractContextManager[None]:
    """Let DDP average gradients over processes only with the last batch of an update."""
    model = trainer.strategy.model
    return model.no_sync() if not complete and isinstance(model, DistributedDataParallel) else nullcontext()
