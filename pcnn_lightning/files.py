"""Files and folders that a user may have put out of reach."""

import os
from contextlib import suppress
from pathlib import Path

from pcnn_lightning.errors import InputError


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


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write beside ``path``, then move there what is whole and on the disk.

    Whatever happens meanwhile, a full disk or ``kill -9``, the file that was there before stays as it was.

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
