"""Compiles networks in C with the compiler of this machine."""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pcnn_lightning.deploy.c.source import Source, to_c
from pcnn_lightning.deploy.description import Description
from pcnn_lightning.deploy.packed import PackedNetwork, load_packed
from pcnn_lightning.errors import InputError


class CompiledNetwork:
    """A network that runs as compiled C, on one thread.

    Args:
        description: description of the network.
        source: the network in C.
        library: path of the shared library made of it, which is not needed afterwards.

    Attributes:
        description: description of the network.
    """

    def __init__(self, description: Description, source: Source, library: Path) -> None:
        self.description, self._arena_bytes = description, source.arena_bytes
        self._classify = getattr(ctypes.CDLL(str(library)), f"{source.name}_classify")
        self._classify.argtypes, self._classify.restype = [ctypes.c_void_p] * 3, ctypes.c_int

    def logits(self, images: Tensor) -> Tensor:
        """Compute the logits (B, num_classes) float32 of ``images`` (B, C, H, W) uint8, which may have any strides.

        Raises:
            ValueError: if they have another dtype or shape.
        """
        return self._run(images)[0]

    def classify(self, images: Tensor) -> Tensor:
        """Predict the label (B,) of ``images`` (B, C, H, W) uint8, of the size that the network was trained for.

        Raises:
            ValueError: if they have another dtype or shape.
        """
        return self._run(images)[1]

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.description.check_images(images)
        images = images.cpu().contiguous()
        logits = torch.empty(len(images), self.description.num_classes, dtype=torch.float32)
        arena = torch.empty(self._arena_bytes, dtype=torch.uint8)  # of this call, so that threads do not share it
        first, image_bytes = images.data_ptr(), images[:1].numel()
        row_bytes = 4 * self.description.num_classes
        labels = [
            self._classify(first + index * image_bytes, logits.data_ptr() + index * row_bytes, arena.data_ptr())
            for index in range(len(images))
        ]
        return logits, torch.tensor(labels, dtype=torch.int64)


def compile_c(
    network: PackedNetwork | str | os.PathLike[str],
    *,
    compiler: str | None = None,
    flags: Sequence[str] = ("-O3", "-march=native"),
) -> CompiledNetwork:
    """Translate a network to C, compile it for this machine and load it.

    Args:
        network: a network as :func:`pcnn_lightning.deploy.load_packed` returns it, or the path of a packed file.
        compiler: the compiler, with the interface of GCC and Clang; by default that of the environment variable ``CC``,
            or ``cc``.
        flags: what to compile with, beside what makes a shared library of C99.

    Raises:
        InputError: if there is no compiler, it fails, the file cannot be loaded, or a layer cannot be translated.
    """
    packed = network if isinstance(network, PackedNetwork) else load_packed(network)
    command = shlex.split(compiler or os.environ.get("CC") or "cc")
    if not command or shutil.which(command[0]) is None:
        raise InputError(f"there is no C compiler {' '.join(command)!r} here: install GCC or Clang, or set CC to yours")
    source = to_c(PackedNetwork.of(packed, packed.description), "network")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "network.so")
        Path(folder, "network.h").write_text(source.header, "utf-8")
        Path(folder, "network.c").write_text(source.code, "utf-8")
        command += ["-std=c99", *flags, "-shared", "-fPIC", "-o", "network.so", "network.c"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise InputError(f"{' '.join(command)} failed: {first}")
        return CompiledNetwork(packed.description, source, library)
