"""Reading and writing files safely."""

import csv
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pcnn_lightning.errors import InputError

LOSSES, TESTED, TIMES, SUMMARY = "losses.csv", "test.csv", "times.csv", "summary.csv"
"""Tables in the folder of a run."""
SWEEP = "sweep.yaml"
"""The record of a sweep, beside the folders of its runs."""


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
        if not Path(path).is_file():  # a pipe could not be read a second time
            return False
        with Path(path).open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: to a temporary file beside it, which then replaces it.

    A full disk or ``kill -9`` leaves the previous file as it was, and writers of the same file do not disturb each
    other. A symbolic link stays one, and a pipe or device is written to as it is.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); what was there before is whole") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``, which replaces it at the end, unless there is an error.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f"{socket.gethostname()}-{os.getpid()}"
    unfinished = path.with_name(f"{path.name[:40]}.{own}-{secrets.token_hex(4)}.part")  # names have at most 255 bytes
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        with suppress(OSError):  # it was moved, or never made
            unfinished.unlink()
    _remove_unfinished(path)


def _remove_unfinished(path: Path) -> None:
    """Remove the temporary files that processes of this machine have left when they were killed."""
    if os.name != "posix":  # elsewhere, os.kill would end the process that it is to look for
        return
    own = re.compile(rf"{re.escape(f'{path.name[:40]}.{socket.gethostname()}')}-(\d+)-[0-9a-f]{{8}}\.part")
    for left in path.parent.iterdir():
        if match := own.fullmatch(left.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                left.unlink(missing_ok=True)
            except OSError:  # another user's process
                pass


def read_rows(file: Path) -> list[dict[str, str]]:
    """Read the rows of a table; none if there is no such file.

    Raises:
        InputError: if it is no table.
    """
    if not file.is_file():
        return []
    try:
        with file.open(newline="", encoding="utf-8", errors="replace") as lines:
            return list(csv.DictReader(line.replace("\0", "") for line in lines))
    except csv.Error as error:
        raise InputError(f"{file} is not a table: {error}") from error
