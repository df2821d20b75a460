"""Ends a run between two batches, so that the checkpoint it leaves is exact."""

import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any


class Interruption:
    """Within it, Ctrl-C does what SIGTERM does: Lightning ends the run after the batch at hand.

    A second Ctrl-C ends it at once, perhaps in the middle of an update, which no checkpoint is made of.

    Attributes:
        status: what to exit with, 128 + the number of the signal, as shells and schedulers have it.
    """

    def __init__(self) -> None:
        self.status = 128 + signal.SIGTERM

    def __enter__(self) -> "Interruption":
        self._before, self._process = signal.getsignal(signal.SIGINT), os.getpid()
        if threading.current_thread() is threading.main_thread():  # the only one that signals reach
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: Any) -> None:
        # A terminal sends Ctrl-C to loaders' workers and to further processes too, which the first process ends.
        if os.getpid() != self._process or int(os.environ.get("LOCAL_RANK", 0)) > 0:
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None):  # nothing is trained yet
            raise KeyboardInterrupt
        self.status = 128 + signal.SIGINT
        print("\nEnding after this batch. Ctrl-C again ends at once, without a checkpoint.", file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)
