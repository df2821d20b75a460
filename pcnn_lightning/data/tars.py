"""Images in tars, in the layout of WebDataset, read in place.

A tar is scanned once. Its index, a file beside it, says where its images are and which labels they have, so that any
image can be read at any time. Only plain tars can be read so, and nothing is unpacked.
"""

import errno
import hashlib
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pcnn_lightning.data.base import as_it_is, leave_interrupts_to_the_first_process
from pcnn_lightning.data.layout import EXTENSIONS, some_of
from pcnn_lightning.data.sources import Source
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole

try:
    import resource
except ImportError:  # Windows, where 512 files can be open
    resource = None  # type: ignore[assignment]

IMAGES = tuple(extension.removeprefix(".") for extension in EXTENSIONS)
"""Extensions of the members that are images: those of the files in folders."""
LABEL_KEYS = ("label", "cls")
"""Names of a label in a member ending in ``.json``; the first one found is taken."""
FORMAT = "2"
"""Version of the index files."""

_ARRAYS = ("labels", "offsets", "sizes", "names")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512  # bytes; a tar consists of such blocks, and ends with two of zeros
_OPEN = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2) if resource else 64  # tars; the rest is for others


class Index(NamedTuple):
    """The images of a tar.

    Args:
        labels: (N,) int64.
        offsets: (N,) int64, first byte of each image in the tar.
        sizes: (N,) int64, number of bytes.
        names: (N,) bytes, paths within the tar.
        stamp: number of bytes of the tar, and time of its last change in nanoseconds.
    """

    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: NDArray[np.bytes_]
    stamp: tuple[int, int]


# --- which tars there are --------------------------------------------------------------------------------------------


def expand(pattern: str) -> list[str]:
    """Expand the braces of a shell: ``a{00..02}`` to ``a00``, ``a01`` and ``a02``; ``{a,b}`` to ``a`` and ``b``.

    Raises:
        InputError: if there are braces within braces, or one without its other.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if place % 2 else [part] for place, part in enumerate(parts)]
    if any(brace in part for part in parts[::2] for brace in "{}"):
        raise InputError(f"{pattern} must have pairs of braces, and none within another")
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(braces: str) -> list[str]:
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", braces):
        first, last = bounds.groups()
        step = 1 if int(first) <= int(last) else -1
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + step, step)]
    return braces.split(",")


def find_shards(root: Path, patterns: str | Sequence[str], suffix: str) -> list[str]:
    """Find the files that patterns stand for.

    Args:
        root: folder to which the patterns are relative.
        patterns: a pattern or several: a file, a folder, or files with braces, ``*`` or ``?``.
        suffix: how the names of files in folders end.

    Returns:
        The paths of the files, in the order of the patterns and sorted within each.

    Raises:
        InputError: if there are none for a pattern, or one file twice.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path in (root / name for name in expand(str(Path(pattern).expanduser()))):
            if path.is_dir():
                files = [one for one in sorted(path.iterdir()) if _is_shard(one, suffix)]
            elif re.search(r"[*?]", path.name):
                files = [one for one in sorted(path.parent.glob(path.name)) if _is_shard(one, suffix)]
            else:
                files = [path] if path.is_file() else []
            if not files:
                expected = f"a file, or a folder or pattern of files ending in {suffix}"
                raise InputError(f"{path} does not lead to images: expected {expected}")
            found += map(str, files)
    if twice := [path for path, times in Counter(map(os.path.realpath, found)).items() if times > 1]:
        raise InputError(f"{some_of(twice)} must be named once, but the patterns lead there several times")
    return found


def _is_shard(path: Path, suffix: str) -> bool:
    return path.name.endswith(suffix) and not path.name.startswith(".") and path.is_file()


# --- the index of a tar ----------------------------------------------------------------------------------------------


def scan(tar: str) -> Index:
    """Find the images of a tar and their labels, in the order in which they lie there.

    Raises:
        InputError: if it is compressed, truncated or no tar at all; if an image has no label or a wrong one, or two
            have the same key.
    """
    try:
        with open(tar, "rb") as file:  # noqa: PTH123
            start = file.read(8)
            if kind := next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None):
                raise InputError(
                    f"{tar} is compressed by {kind}, so that its images cannot be read in place: unpack it"
                )
            file.seek(0)
            return _scan(tar, file)
    except tarfile.TarError as error:
        raise InputError(f"{tar} cannot be read as a tar: {error}") from None
    except OSError as error:
        raise InputError(f"{tar} cannot be read: {error.strerror}") from None


def _scan(tar: str, file: BinaryIO) -> Index:
    images: dict[str, tuple[int, int, str]] = {}  # offset, size and name by key, the name up to the first dot
    about: dict[str, dict[str, tuple[int, int, str]]] = {"cls": {}, "json": {}}  # likewise
    strange: dict[str, str] = {}  # names of images whose key ends before their extension
    descriptor, last = file.fileno(), ""
    stamp = stamp_of(descriptor)
    with tarfile.open(fileobj=file, mode="r:") as members:
        for member in members:
            name = member.name.removeprefix("./")
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.lower().partition(".")
            if not stem or not (member.isfile() or member.islnk() or member.issym()):
                continue
            key, kind = f"{folder}/{base.partition('.')[0]}", extension.rpartition(".")[2]
            if extension in (*IMAGES, *about) and (member.issparse() or not member.isfile()):
                what = "sparse" if member.issparse() else "a link"
                raise InputError(f"{tar}: {name} is {what}, so that it cannot be read in place: pack whole files")
            last, place = name, (member.offset_data, member.size, name)
            if not member.issparse() and member.offset_data + member.size > stamp[0]:
                raise InputError(f"{tar} is truncated within its member {last}")
            if extension in (*IMAGES, *about):
                those = images if extension in IMAGES else about[extension]
                if key in those:
                    what = "images" if extension in IMAGES else "labels"
                    raise InputError(f"{tar} has two {what} of the key {key.lstrip('/')}: {those[key][2]} and {last}")
                those[key] = place
            elif kind in IMAGES:
                strange[key] = name
        rest = os.pread(descriptor, 2**20, members.offset)  # more than any usual padding
        if rest[:_BLOCK] != bytes(_BLOCK):
            raise InputError(f"{tar} is truncated, or damaged, after its member {last}")
        if any(rest):
            raise InputError(f"{tar} goes on after its end, as if several were joined: name each, or join by tar -A")
    if lost := [name for key, name in strange.items() if key not in images]:
        raise InputError(f"{tar}: {lost[0]} has a dot before its extension, but a key ends at its first dot: rename it")
    if lost := [name for key, (_, _, name) in about["cls"].items() if key not in images]:
        raise InputError(f"{tar}: {lost[0]} is a label without an image")
    if not images:
        raise InputError(f"{tar} holds no images: expected members ending in {', '.join(f'.{one}' for one in IMAGES)}")
    labels = []
    for key, (_, _, name) in images.items():
        kind = "cls" if key in about["cls"] else "json"
        if key not in about[kind]:
            stem = name.rpartition(".")[0]
            raise InputError(f"{tar}: {name} has no label: expected a member {stem}.cls or {stem}.json beside it")
        offset, size, where = about[kind][key]
        content = os.pread(descriptor, size, offset)
        labels.append(_label(tar, where, _class_index(content) if kind == "cls" else _described(content)))
    offsets, sizes, names = zip(*images.values(), strict=True)
    return Index(
        np.array(labels),
        np.array(offsets),
        np.array(sizes),
        np.array([os.fsencode(name) for name in names]),
        stamp,
    )


def _class_index(content: bytes) -> Any:
    text = content[:100].decode(errors="replace")
    return int(text) if re.fullmatch(r"\s*-?[0-9]{1,20}\s*", text) else text


def _described(content: bytes) -> Any:
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):
        about = content[:100].decode(errors="replace")
    keys = [key for key in LABEL_KEYS if key in about] if isinstance(about, dict) else []
    return about[keys[0]] if keys else about


def _label(tar: str, member: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise InputError(
            f"{tar}: the label in {member} must be an integer of at least 0, in a .json under the name "
            f"{' or '.join(LABEL_KEYS)}, but got {str(value)[:100]!r}"
        )
    return value


def stamp_of(file: str | int) -> tuple[int, int]:
    """Size and time of the last change of a file or descriptor, by which a changed file is recognized."""
    status = os.stat(file)  # noqa: PTH116
    return status.st_size, status.st_mtime_ns


def places(file: str, ending: str, cache_dir: Path | None) -> list[Path]:
    """The paths at which a file made of ``file`` may be: beside it, or in the user's cache folder.

    Args:
        file: path of the file.
        ending: what to append to its name.
        cache_dir: the only folder for it.
    """
    beside = Path(f"{file}{ending}")
    place = hashlib.sha256(os.fsencode(os.path.abspath(beside.parent))).hexdigest()[:12]  # noqa: PTH100
    if cache_dir is not None:
        return [cache_dir / place / beside.name]
    caches = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))  # noqa: PTH111
    return [beside, *([caches / "pcnn_lightning" / place / beside.name] if caches.is_absolute() else [])]


def writable(paths: Sequence[Path]) -> Path:
    """Return the first of the paths whose folder is writable, or else the last one."""
    return next((path for path in paths if os.access(path.parent, os.W_OK)), paths[-1])


def _metadata(stamp: tuple[int, int]) -> dict[str, str]:
    return {"format": FORMAT, "size": str(stamp[0]), "modified": str(stamp[1])}


def _read_index(tar: str, cache_dir: Path | None) -> Index | None:
    """Read the index of a tar, or return None if there is none of the tar as it is now."""
    stamp = stamp_of(tar)
    for path in places(tar, ".index", cache_dir):
        with suppress(OSError, SafetensorError), safe_open(path, "numpy") as file:
            if file.metadata() == _metadata(stamp):
                labels, offsets, sizes, names = (file.get_tensor(name) for name in _ARRAYS)
                return Index(labels, offsets, sizes, names.view(f"S{names.shape[1]}")[:, 0], stamp)
    return None


def _write_index(tar: str, cache_dir: Path | None) -> str | None:
    """Scan a tar and write its index; return what is wrong with it, because workers would wrap the error."""
    try:
        labels, offsets, sizes, names, stamp = scan(tar)
        rows = names[:, None].view(np.uint8)  # of bytes, since the format has no strings
        arrays: dict[str, NDArray[Any]] = dict(zip(_ARRAYS, (labels, offsets, sizes, rows), strict=True))
        write_whole(writable(places(tar, ".index", cache_dir)), save(arrays, _metadata(stamp)))
    except InputError as error:
        return str(error)
    return None


def read_indexes(tars: Sequence[str], cache_dir: Path | None = None) -> dict[str, Index]:
    """Read the indexes of tars; those that are missing or outdated are made first, by all cores.

    Args:
        tars: paths.
        cache_dir: where the indexes are kept; None for beside the tars, or ``~/.cache/pcnn_lightning`` where that is
            read-only.

    Raises:
        InputError: if a tar cannot be used, or an index cannot be written.
    """
    found = {tar: _read_index(tar, cache_dir) for tar in tars}
    missing = [tar for tar, index in found.items() if index is None]
    if missing:
        work_on("tars indexed", missing, partial(_write_index, cache_dir=cache_dir))
        found |= {tar: _read_index(tar, cache_dir) for tar in missing}
    if changing := [tar for tar, index in found.items() if index is None]:
        raise InputError(f"{some_of(changing)} changed while being indexed: wait until all tars are complete")
    return {tar: index for tar, index in found.items() if index is not None}


def work_on(what: str, files: Sequence[str], work: Callable[[str], str | None]) -> None:
    """Do something with each of the files, by all cores, with a progress bar.

    Args:
        what: what is done, as a heading.
        files: paths.
        work: function that returns what is wrong with a file, or None.

    Raises:
        InputError: if something is wrong with a file.
    """
    workers = min(os.cpu_count() or 1, len(files))
    loader: DataLoader[Any] = DataLoader(
        _Work(files, work),
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=workers if workers > 1 else 0,  # unlike those of other pools, they end if this process is killed
        worker_init_fn=leave_interrupts_to_the_first_process if workers > 1 else None,
        generator=torch.Generator(),
    )
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not first or not sys.stderr.isatty()) as bar:
        for said in bar.track(loader, len(files), description=what):
            if said is not None:
                raise InputError(said)
    rank_zero_info(f"{what}: {len(files):,}")


class _Work(Dataset[Any]):
    """The results of a function for each of the files, by index."""

    def __init__(self, files: Sequence[str], work: Callable[[str], str | None]) -> None:
        self.files, self.work = files, work

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str | None:
        return self.work(self.files[index])


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarFiles(Source):
    """Images within tars: 20 bytes of memory each beside the longest of their names, which workers share.

    Args:
        tars: paths of the tars.
        stamps: size and time of change of each, when it was indexed.
        owners: (N,) int32, the position in ``tars`` of the tar of each image.
        offsets: (N,) int64, first byte of each image in its tar.
        sizes: (N,) int64, number of bytes.
        names: (N,) bytes, paths within the tar.
    """

    tars: Sequence[str]
    stamps: Sequence[tuple[int, int]]
    owners: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.owners)

    def open(self, index: int) -> BinaryIO:
        owner, size = self.owners[index], int(self.sizes[index])
        content = _opened(self.tars[owner], self.stamps[owner]).read(size, int(self.offsets[index]))
        if len(content) < size:
            raise ValueError("the tar is truncated")
        return BytesIO(content)

    def name(self, index: int) -> str:
        return f"{self.tars[self.owners[index]]}:{os.fsdecode(self.names[index])}"

    def identity(self, index: int, root: Path) -> str:
        return f"{os.fsdecode(self.names[index])} of {self.sizes[index]} bytes"  # names alone may be those of others

    def select(self, indices: Tensor) -> "TarFiles":
        chosen = indices.numpy()
        arrays = {name: getattr(self, name)[chosen] for name in ("owners", "offsets", "sizes", "names")}
        return replace(self, **arrays)


def in_order(indexes: Mapping[str, Index]) -> tuple[TarFiles, Tensor]:
    """The images of tars, in the order of their labels and names, however they are dealt out to the tars.

    It is the order of a folder with one subfolder per class. Images of the same label and name are in the order of
    their tars.

    Args:
        indexes: the index of each tar, by its path.

    Returns:
        The images, and their labels, (N,) int64.
    """
    tars = list(indexes)
    owners = np.repeat(np.arange(len(tars), dtype=np.int32), [len(one.labels) for one in indexes.values()])
    *parts, stamps = zip(*indexes.values(), strict=True)
    labels, offsets, sizes, names = map(np.concatenate, parts)
    order = torch.from_numpy(np.lexsort((names, labels)))
    return TarFiles(tars, stamps, owners, offsets, sizes, names).select(order), torch.from_numpy(labels)[order]


@lru_cache(maxsize=_OPEN)
def _opened(tar: str, stamp: tuple[int, int]) -> "_Tar":
    return _Tar(tar, stamp)


class _Tar:
    """An open tar. Reading moves no position, so that threads and processes may share it; the last one closes it."""

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._stamp = stamp

    def read(self, size: int, offset: int) -> bytes:
        content = os.pread(self._descriptor, size, offset)
        if stamp_of(self._descriptor) != self._stamp:  # a thousandth of the time that decoding takes
            raise OSError(errno.ESTALE, "the tar has changed since it was indexed")
        return content

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
