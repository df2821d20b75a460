"""Decoding image files to 8-bit RGB or gray."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pcnn_lightning.errors import InputError

LOOKED_AT = 1000
"""Number of files whose headers are read to tell what images there are; those of all of ImageNet would take minutes."""

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def decode(file: str, grayscale: bool = False) -> Image.Image:
    """Read an image file as 8-bit RGB, or as 8-bit gray.

    Transparency is dropped, palettes are resolved, gray is copied to three channels and 16-bit gray is scaled to 8
    bits. EXIF orientation is ignored, as in torchvision.

    Raises:
        InputError: if the file is missing, unreadable, corrupt, not a regular file or not in one of the formats of
            :data:`~pcnn_lightning.data.layout.EXTENSIONS`.
    """
    try:
        return _decode(file, grayscale)
    except Exception as error:  # for corrupt files, Pillow's plugins raise all kinds of exceptions
        raise unreadable({file: error}) from None


def _decode(file: str, grayscale: bool) -> Image.Image:
    with _open(file) as opened:
        image: Image.Image = opened
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range")
        if image.mode.startswith("I"):  # 16 bits; Pillow would clip at 255 instead of scaling
            pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
        if "transparency" in image.info:  # avoids a Pillow warning
            image = image.convert("RGBA")
        return image.convert("L" if grayscale else "RGB")


def look_at(files: Sequence[str], most: int = LOOKED_AT) -> tuple[Counter[tuple[int, int]], bool]:
    """Count the sizes (W, H) of images by their headers, and tell whether all of them are gray.

    Files that cannot be read are passed over.

    Args:
        files: paths.
        most: how many files to read, evenly spaced.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    gray = True
    for file in files[:: -(-len(files) // most) or 1]:
        try:
            with _open(file) as image:
                sizes[image.size] += 1
                gray &= image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        except Exception:  # decoding names it
            continue
    return sizes, gray and bool(sizes)


def _open(file: str) -> Image.Image:
    if not stat.S_ISREG(os.stat(file).st_mode):  # noqa: PTH116  # opening a named pipe would wait for a writer
        raise ValueError("not a regular file")
    return Image.open(file, formats=_FORMATS)  # some of Pillow's other formats, such as EPS, start programs


def unreadable(failures: dict[str, Exception], listed: str = "", can_be_left_out: bool = True) -> InputError:
    """Create the error for files that cannot be read. It names at most ten of them.

    Args:
        failures: the error of each file.
        listed: where the others are named.
        can_be_left_out: whether to advise ``skip_corrupt``, if it would help.
    """
    some = "; ".join(f"{file} cannot be read as an image: {_reason(failures[file])}" for file in list(failures)[:10])
    one = len(failures) == 1
    counted = "" if one else f"{len(failures):,} files: "
    more = f"; and {len(failures) - 10:,} more{listed}" if len(failures) > 10 else ""
    advice = "Replace the file or remove it from the folder" if one else "Replace the files or remove them"
    if can_be_left_out and all(map(is_corrupt, failures.values())):
        advice += f", or leave {'it' if one else 'them'} out by --data.skip_corrupt true"
    return InputError(f"{counted}{some}{more}. {advice}.")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown image format"  # Pillow's message would repeat the path
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__


def is_corrupt(error: Exception) -> bool:
    """Whether it is the content of a file that cannot be read, so that the file fails always and everywhere."""
    return not (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL))  # seeking to where no byte is


def decode_all(
    files: Sequence[str], size: tuple[int, int], fit: bool, grayscale: bool = False
) -> tuple[Tensor, dict[str, Exception]]:
    """Decode images of equal size into one tensor.

    Args:
        files: N paths.
        size: (W, H) in pixels.
        fit: resize and center-crop images of any other size to this size, instead of raising an error.
        grayscale: decode to one channel instead of three.

    Returns:
        (N, C, H, W) uint8, and the errors of the files that cannot be read, whose pixels are undefined.

    Raises:
        InputError: if a file has a different size; the message names the first such file.
    """
    width, height = size
    images = np.empty((len(files), 1 if grayscale else 3, height, width), dtype=np.uint8)

    def fill(position: int, file: str) -> None:
        image = _decode(file, grayscale)
        if image.size != size and not fit:
            raise different_size(file, image.size, size)
        images[position] = to_array(fitted(image, size))

    failures = _in_threads(fill, files)
    return torch.from_numpy(images), failures


def failing(files: Sequence[str]) -> dict[str, Exception]:
    """Decode images without keeping them, and return the errors of those that cannot be read."""
    return _in_threads(lambda _, file: _decode(file, grayscale=False), files)


def _in_threads(work: Callable[[int, str], object], files: Sequence[str]) -> dict[str, Exception]:
    """Do ``work(position, file)`` for all files, and return the errors of those that cannot be read, in order."""

    def work_from(start: int) -> dict[str, Exception]:
        failures: dict[str, Exception] = {}
        for position, file in enumerate(files[start : start + 256], start):
            try:
                work(position, file)
            except (InputError, MemoryError):  # not for lack of a readable file
                raise
            except Exception as error:
                failures[file] = error
        return failures

    # Threads, because Pillow releases the GIL while decoding; 256 files per task, to limit the overhead of tasks.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            parts = list(pool.map(work_from, range(0, len(files), 256)))
        finally:
            pool.shutdown(cancel_futures=True)
    return {file: error for part in parts for file, error in part.items()}


def different_size(file: str, size: tuple[int, int], expected: tuple[int, int]) -> InputError:
    """Create the error for a file whose size differs from that of the others."""
    return InputError(
        f"{file} has {size[0]}×{size[1]} pixels where others have {expected[0]}×{expected[1]}: "
        "set --data.image_size to resize all images to the same size"
    )


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize and center-crop an image to ``size`` (W, H), unless it has that size."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.BILINEAR)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an RGB or gray image, (C, H, W)."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
