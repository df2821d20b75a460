"""Images in Parquet files, copied to tars once."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pcnn_lightning.data.base import Split
from pcnn_lightning.data.memory import amount
from pcnn_lightning.data.tars import places, stamp_of, work_on, writable
from pcnn_lightning.data.webdataset import CLASSES, WebDataset
from pcnn_lightning.errors import InputError, one_line
from pcnn_lightning.files import replacing

_FORMAT = "1"  # of the copies
_ROWS = 64  # read at a time
_MAGIC = {b"\x89PNG": "png", b"RIFF": "webp"}  # all else is taken for JPEG, and named when it is decoded


class ParquetImages(WebDataset):
    """Images in Parquet files, as the Hugging Face Hub distributes them; needs ``pip install '.[parquet]'``.

    Parquet compresses hundreds of rows together, so that reading one image means to read all of them. Therefore the
    images are copied to tars once, as they are, which takes as much of the disk again. Then all is as in
    :class:`~pcnn_lightning.data.webdataset.WebDataset`; the order is that of labels, files and rows.

    Args:
        root: folder of the dataset.
        train: Parquet files of the training images: a folder of them, a file, or several by ``{000..146}``, ``*`` or
            ``?``; a list of these; relative to ``root``. None takes the folder ``root/train``.
        val: Parquet files of the validation images, likewise; None takes ``root/val`` if it exists.
        test: Parquet files of the test images, likewise; None takes ``root/test`` if it exists.
        image_column: column of the images, either their bytes or a structure with ``bytes``.
        label_column: column of the labels, integers.
        num_classes: number of classes; None takes the number of ``classes``, or the largest label plus one if each
            label up to it has images.
        classes: names of the classes, by label; None takes the lines of ``root/classes.txt`` if it exists, or the names
            that the ``datasets`` library has written to the files.
        cache_dir: folder for the tars; None keeps each beside its Parquet file, or in ``~/.cache/pcnn_lightning`` if
            that folder is read-only.
        kwargs: see :class:`~pcnn_lightning.data.encoded.EncodedImages`.

    Raises:
        ValueError: if an argument is of the wrong type or out of range.
        InputError: if there are no files or no such columns, ``pyarrow`` is missing, or ``num_classes`` is not the
            number of classes.
    """

    suffix = ".parquet"

    def __init__(
        self, root: str = "data", image_column: str = "image", label_column: str = "label", **kwargs: Any
    ) -> None:
        for name, value in {"image_column": image_column, "label_column": label_column}.items():
            if not isinstance(value, str):
                raise ValueError(f"{name} must be the name of a column, but got {value!r}")
        self.image_column, self.label_column = image_column, label_column
        super().__init__(root, **kwargs)

    def find_classes(self, num_classes: int | None) -> tuple[list[str], str]:
        if not (self.root / CLASSES).is_file():
            try:
                file = next(iter(self.shards().values()))[0]
            except InputError:
                if num_classes is None:
                    raise
            else:
                if names := _names_of_classes(file, self.label_column):
                    return names, f"{file} has"
        return super().find_classes(num_classes)

    def labels_found(self) -> list[int]:
        files = [file for of_split in self.shards().values() for file in of_split]
        return sorted(set().union(*(_labels(file, self.label_column) for file in files))) or [0]

    def tars(self) -> dict[Split, list[str]]:
        """Copy the images to tars, unless that is done, and return the tars of each split.

        Raises:
            InputError: if a file cannot be read, or the disk is too small.
        """
        shards = self.shards()
        copies = {file: self._copy_of(file) for files in shards.values() for file in files}
        if missing := {file: copy for file, copy in copies.items() if not copy.is_file()}:
            _check_space(missing)
            copy = partial(_copy, copies=missing, image_column=self.image_column, label_column=self.label_column)
            work_on("Parquet files copied to tars", list(missing), copy)
        return {split: [str(copies[file]) for file in files] for split, files in shards.items()}

    def _copy_of(self, file: str) -> Path:
        """The tar of a file as it is now, and of these columns."""
        made_of = (_FORMAT, *map(str, stamp_of(file)), self.image_column, self.label_column)
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
        paths = places(file, f".{digest}.tar", self.cache_dir)
        return next((path for path in paths if path.is_file()), writable(paths))


def _check_space(copies: dict[str, Path]) -> None:
    folder = next(iter(copies.values())).parent
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(Path(file).stat().st_size for file in copies), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{len(copies):,} Parquet files take {amount(needed)} of the disk again as tars, but {amount(free)} are "
            f"free in {folder}: set --data.cache_dir to another one"
        )


def _opened(file: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError("Parquet files need pyarrow: pip install '.[parquet]'") from None
    try:
        return parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as a Parquet file: {one_line(error)}") from None


def _check_column(file: str, columns: Any, argument: str, name: str) -> None:
    if name not in columns.names:
        raise InputError(f"{file} has no column {name}: set --data.{argument} to one of {', '.join(columns.names)}")


def _names_of_classes(file: str, label_column: str) -> list[str] | None:
    """Read the names that the ``datasets`` library keeps in the metadata of a file."""
    metadata = _opened(file).schema_arrow.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label_column]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _labels(file: str, label_column: str) -> set[int]:
    opened = _opened(file)
    _check_column(file, opened.schema_arrow, "label_column", label_column)
    labels = opened.read([label_column])[label_column].to_pylist()
    return {label for label in labels if isinstance(label, int) and label >= 0}  # the others are refused when copied


def _copy(file: str, copies: dict[str, Path], image_column: str, label_column: str) -> str | None:
    """Copy the images of a file to a tar; return what is wrong with it, because workers would wrap the error."""
    try:
        opened = _opened(file)
        _check_column(file, opened.schema_arrow, "image_column", image_column)
        _check_column(file, opened.schema_arrow, "label_column", label_column)
        with replacing(copies[file]) as target, tarfile.open(fileobj=target, mode="w") as tar:
            for row, (image, label) in enumerate(_rows(opened, image_column, label_column)):
                content = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(content, bytes) or type(label) is not int or label < 0:
                    raise InputError(
                        f"{file}: row {row} must have the bytes of an image in {image_column} and an integer of at "
                        f"least 0 in {label_column}, but has {type(content).__name__} and {label!r}"
                    )
                key = f"{Path(file).name}/{row:08d}"
                _add(tar, f"{key}.{_MAGIC.get(content[:4], 'jpg')}", content)
                _add(tar, f"{key}.cls", str(label).encode())
    except InputError as error:
        return str(error)
    except (OSError, ValueError, RuntimeError) as error:  # pyarrow's exceptions derive from these
        return f"{file} cannot be copied to {copies[file]}: {one_line(error)}"
    return None


def _rows(opened: Any, *columns: str) -> Iterator[tuple[Any, ...]]:
    for batch in opened.iter_batches(_ROWS, columns=list(columns)):
        yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
