"""The two errors that the command line reports as one line, without a traceback."""

import os
from pathlib import Path


class InputError(ValueError):
    """Something the user gave (configuration, data, checkpoint) cannot be used; the message says what is allowed."""


class DivergedError(RuntimeError):
    """The loss is no longer a number; the message names the first step and the last good checkpoint."""


def check_writable(folder: Path) -> None:
    """Make ``folder`` if it is missing.

    Raises:
        InputError: if that is not possible, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"no permission to write into {folder}")
