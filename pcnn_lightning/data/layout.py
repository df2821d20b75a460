"""Where the images of a folder are: its splits, their classes, and the files of a class."""

import os
from collections.abc import Sequence
from pathlib import Path

from pcnn_lightning.data.base import Split
from pcnn_lightning.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")

_SPLITS: tuple[Split, ...] = ("train", "val", "test")


def existing_splits(root: Path) -> list[Split]:
    """Return the names of the splits that have a folder."""
    return [split for split in _SPLITS if (root / split).is_dir()]


def agreed_classes(root: Path, classes: Sequence[str] | None = None) -> list[str]:
    """Return the names of the class folders, which must be the same in all splits and, if given, ``classes``."""
    splits = existing_splits(root)
    if not splits:
        raise InputError(f"{root} has no folder train, val or test: expected {root / 'train' / '<class>' / '<image>'}")
    found = [subfolders(root / split) for split in splits]
    if not found[0]:
        raise InputError(f"{root / splits[0]} has no class folders: expected one folder of images per class")
    expected = found[0] if classes is None else classes
    for split, names in zip(splits, found, strict=True):
        missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
        if missing or extra:
            like = f"{root / split} and {root / splits[0]} must have the same class folders"
            if classes is not None:
                like = f"{root / split} must have the folders of the classes {some_of(classes)}"
            raise InputError(f"{like}: missing {some_of(missing) or 'none'}; extra {some_of(extra) or 'none'}")
    return list(expected)


def image_files(folder: Path, required: bool = True) -> list[str]:
    """List the image files below a folder, sorted by path; hidden files and other file types are skipped.

    Symbolic links are followed, except those to a folder that contains them, which would never end.

    Raises:
        InputError: if the folder does not exist or cannot be read, or holds no images although they are ``required``.
    """
    found: list[str] = []
    for directory, subdirectories, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        subdirectories[:] = [
            name
            for name in subdirectories
            if not name.startswith(".") and not _leads_back(Path(directory, name), folder)
        ]
        found += [
            os.path.join(directory, name)  # noqa: PTH118  # millions of Path objects would be slow and large
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if required and not found:
        raise InputError(f"{folder} holds no images: expected files ending in {', '.join(EXTENSIONS)}")
    return sorted(found)


def _leads_back(path: Path, top: Path) -> bool:
    """Whether ``path`` is a symbolic link to a folder that contains one of the folders from ``top`` to ``path``."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    return any(above.resolve().is_relative_to(target) for above in path.parents if above.is_relative_to(top))


def subfolders(folder: Path) -> list[str]:
    """List the names of the subfolders of a folder, sorted; hidden ones are skipped, as are links to this folder.

    Raises:
        InputError: if the folder does not exist or cannot be read.
    """
    try:
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".") and not _leads_back(Path(entry.path), folder)
        )
    except OSError as error:
        _refuse_folder(error)
        raise


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read as a folder: {error.strerror}") from None


def some_of(names: Sequence[str]) -> str:
    """Join at most ten names to a text, and count the others."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
