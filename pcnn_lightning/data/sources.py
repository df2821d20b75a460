"""Where the bytes of image files come from."""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor


class Source(ABC):
    """Image files that are not decoded, by index. Workers share it, so it holds no state that reading changes."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of files."""

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """Open a file to read it.

        Raises:
            OSError: if it is not there or may not be read.
            ValueError: if it is something else than a file.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Path of a file, for messages."""

    @abstractmethod
    def identity(self, index: int, root: Path) -> str:
        """What a checkpoint calls a file, wherever the folder of the dataset, ``root``, is and however it is packed."""

    @abstractmethod
    def select(self, indices: Tensor) -> "Source":
        """Return the files at ``indices``, (n,) int64, in that order."""


class Files(Source):
    """Files of their own.

    Args:
        paths: strings, because millions of Path objects take several times the memory.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> BinaryIO:
        path = self.paths[index]
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  # opening a named pipe would wait for a writer
            raise ValueError("not a regular file")
        return open(path, "rb")  # noqa: PTH123  # the caller closes it

    def name(self, index: int) -> str:
        return self.paths[index]

    def identity(self, index: int, root: Path) -> str:
        return os.path.relpath(self.paths[index], root)

    def select(self, indices: Tensor) -> "Files":
        return Files([self.paths[index] for index in indices.tolist()])
