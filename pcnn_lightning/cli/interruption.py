"""Stops a run between two batches, so that its checkpoint is exact."""

import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any


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
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None):  # training has not begun
            raise KeyboardInterrupt
        self.status = 128 + signal.SIGINT
        print("\nEnding after this batch. Ctrl-C again ends at once, without a checkpoint.", file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)
