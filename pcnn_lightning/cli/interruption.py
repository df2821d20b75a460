"""Stops a run between two batches, so that its checkpoint is exact, and says how to go on from it."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, Timer

from pcnn_lightning.cli.checkpoint_argument import without_checkpoint


class Interruption:
    """Within this context, Ctrl-C acts like SIGTERM: Lightning ends the run after the current batch.

    A second Ctrl-C ends it at once, perhaps in the middle of an update, without a checkpoint.

    Attributes:
        status: exit status, 128 + the number of the signal, as is usual for shells and schedulers.
    """

    def __init__(self) -> None:
        self.status = 128 + signal.SIGTERM

    def __enter__(self) -> "Interruption":
        self._before, self._process = signal.getsignal(signal.SIGINT), os.getpid()
        self._sigterm_before = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():  # only it receives signals
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: Any) -> None:
        # A terminal also sends Ctrl-C to data loader workers and other processes, which the first process ends.
        if os.getpid() != self._process or int(os.environ.get("LOCAL_RANK", 0)) > 0:
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) == self._sigterm_before:  # Lightning sets its own when training begins
            raise SystemExit(128 + signal.SIGINT)  # Lightning would turn KeyboardInterrupt into status 1
        self.status = 128 + signal.SIGINT
        print("\nEnding after this batch. Ctrl-C again ends at once, without a checkpoint.", file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)


class BetweenBatches(Callback):
    """Lets Lightning act on signals only between two batches or epochs.

    Lightning's handlers save a checkpoint (SLURM's requeue signal) or call the other processes (SIGTERM) at once, amid
    a batch: the checkpoint would be half updated, and the processes would wait for each other for ever. Here the
    processes agree at the end of a batch, every ``trainer.log_every_n_steps`` batches if there are several, and at the
    end of an epoch.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[..., Any]] = {}
        self._received: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handlers, self._received = {}, []
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            of_lightning = type(handler).__module__.startswith("lightning.pytorch")
            # With one process, Lightning itself only notes SIGTERM until the batch ends.
            if callable(handler) and of_lightning and (number != signal.SIGTERM or trainer.world_size > 1):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every: int = 1 if trainer.world_size == 1 else trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        # The last batch is followed by a validation or the end of the epoch, which a checkpoint is to hold as well.
        if (batch_idx + 1) % every == 0 and not trainer.is_last_batch:
            self._act(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._act(trainer)

    def _note(self, number: int, _: Any) -> None:
        self._received.append(number)

    def _act(self, trainer: Trainer) -> None:
        for number, handler in self._handlers.items():
            received = number in self._received
            if trainer.world_size > 1:
                received = trainer.strategy.reduce_boolean_decision(received, all=False)
            if received:
                self._received = [other for other in self._received if other != number]
                handler(number, None)


class BetweenBatchesAndCheckpoints(BetweenBatches, Checkpoint):
    """As a ``Checkpoint``, it runs after all other callbacks, so that what it saves holds their records.

    A Trainer without checkpoints does not accept it.
    """


def resume_command(trainer: Trainer, args: Sequence[str]) -> str | None:
    """The command that goes on from the last checkpoint of a run, for a shell; None if it has written none.

    It names the file, because ``last`` may soon be that of another run.

    Args:
        trainer: the trainer of the run.
        args: the arguments of the command that was used.
    """
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    saved = [Path(one.last_model_path) for one in callbacks if one.last_model_path and not one.save_weights_only]
    path = max((one for one in saved if one.is_file()), key=lambda one: one.stat().st_mtime, default=None)
    if path is None or not trainer.is_global_zero:
        return None
    place = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    # As it was typed, python with its options included, unless main was called with other arguments.
    begin = sys.orig_argv[: -len(args)] if list(args) == sys.argv[1:] else ["python", "-m", "pcnn_lightning"]
    return shlex.join([*begin, *without_checkpoint(list(args)), "--ckpt_path", str(place)])


def ended_by_time(trainer: Trainer) -> bool:
    """Whether ``max_time`` has ended training."""
    timers = [one for one in trainer.callbacks if isinstance(one, Timer)]  # type: ignore[attr-defined]
    return any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)
