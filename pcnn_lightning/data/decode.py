"""Finding image files and decoding them to 8-bit RGB."""

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pcnn_lightning.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def image_files(folder: Path) -> list[str]:
    """List the image files below a folder, sorted by path; hidden files and other file types are skipped.

    Symbolic links are followed, except those to a folder that contains them, which would never end.

    Raises:
        InputError: if the folder does not exist, cannot be read or holds no images.
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
    if not found:
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


def decode(file: str) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Transparency is dropped, palettes are resolved, gray is copied to three channels and 16-bit gray is scaled to 8
    bits. EXIF orientation is ignored, as in torchvision.

    Raises:
        InputError: if the file is missing, unreadable, corrupt, not a regular file or not in one of the formats of
            :data:`EXTENSIONS`.
    """
    try:
        with _open(file) as opened:
            image: Image.Image = opened
            if image.mode == "F":
                raise ValueError("floating-point pixels have no agreed range")
            if image.mode.startswith("I"):  # 16 bits; Pillow would clip at 255 instead of scaling
                pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
                image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
            if "transparency" in image.info:  # avoids a Pillow warning
                image = image.convert("RGBA")
            return image.convert("RGB")
    except Exception as error:  # for corrupt files, Pillow's plugins raise all kinds of exceptions
        raise _unreadable(file, error) from None


def image_size(file: str) -> tuple[int, int]:
    """Read the width and height of an image from its header, in pixels.

    Raises:
        InputError: if the file is missing, unreadable, not a regular file or not in one of the formats of
            :data:`EXTENSIONS`.
    """
    try:
        with _open(file) as image:
            return image.size
    except Exception as error:
        raise _unreadable(file, error) from None


def _open(file: str) -> Image.Image:
    if not stat.S_ISREG(os.stat(file).st_mode):  # noqa: PTH116  # opening a named pipe would wait for a writer
        raise ValueError("not a regular file")
    return Image.open(file, formats=_FORMATS)  # some of Pillow's other formats, such as EPS, start programs


def _unreadable(file: str, error: Exception) -> InputError:
    if isinstance(error, UnidentifiedImageError):
        reason = "unknown image format"  # Pillow's message would repeat the path
    else:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{file} cannot be read as an image: {reason}. Replace the file or remove it from the folder.")


def decode_all(files: Sequence[str], size: tuple[int, int], fit: bool) -> Tensor:
    """Decode images of equal size into one tensor.

    Args:
        files: N paths.
        size: (W, H) in pixels.
        fit: resize and center-crop images of any other size to this size, instead of raising an error.

    Returns:
        (N, 3, H, W) uint8.

    Raises:
        InputError: if a file cannot be read or has a different size; the message names the first such file.
    """
    width, height = size
    images = np.empty((len(files), 3, height, width), dtype=np.uint8)

    def fill(start: int) -> None:
        for position, file in enumerate(files[start : start + 256], start):
            image = decode(file)
            if image.size != size:
                if not fit:
                    raise different_size(file, image.size, size)
                image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
            images[position] = to_array(image)

    # Threads, because Pillow releases the GIL while decoding; 256 files per task, to limit the overhead of tasks.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in pool.map(fill, range(0, len(files), 256)):
                pass  # in order, so that the first of several corrupt files is reported
        finally:
            pool.shutdown(cancel_futures=True)
    return torch.from_numpy(images)


def different_size(file: str, size: tuple[int, int], expected: tuple[int, int]) -> InputError:
    """Create the error for a file whose size differs from that of the others."""
    return InputError(
        f"{file} has {size[0]}×{size[1]} pixels where the images before it have {expected[0]}×{expected[1]}: "
        "set image_size to resize all images to the same size"
    )


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image, (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1)
