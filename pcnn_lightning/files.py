"""Reading and writing files safely."""

import os
from contextlib import suppress
from pathlib import Path

from pcnn_lightning.errors import InputError


def check_writable(folder: Path) -> None:
    """Make ``folder`` if it is missing.

    Raises:
        InputError: if it cannot be made or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"no permission to write into {folder}")


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a file that begins as a packed network does: with a length of 8 bytes and JSON."""
    try:
        with Path(path).open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: to a temporary file beside ``path``, which then replaces it.

    A full disk or ``kill -9`` leaves the previous file as it was.

    Raises:
        InputError: if the file cannot be written.
    """
    unfinished = Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):  # the folder may be a file
            unfinished.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror}); what was there before is whole") from error
