"""Decoding image files to 8-bit RGB or gray."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg

from pcnn_lightning.data.sources import Source
from pcnn_lightning.errors import InputError, one_line

LOOKED_AT = 1000
"""Number of files whose headers are read to tell what images there are; those of all of ImageNet would take minutes."""

_JPEG = b"\xff\xd8\xff"
"""How a JPEG begins."""
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def decode(source: Source, index: int, grayscale: bool = False) -> Tensor:
    """Read an image file as 8-bit RGB, or as 8-bit gray.

    Transparency is dropped, palettes are resolved, gray is copied to three channels and 16-bit gray is scaled to 8
    bits. EXIF orientation is ignored, as in torchvision.

    Returns:
        (C, H, W) uint8. A pixel's channels lie together in memory, as decoders write them.

    Raises:
        InputError: if the file is missing, unreadable, corrupt, not a regular file or not in one of the formats of
            :data:`~pcnn_lightning.data.layout.EXTENSIONS`.
    """
    try:
        return _decode(source, index, grayscale)
    except Exception as error:  # for corrupt files, Pillow's plugins raise all kinds of exceptions
        raise unreadable({source.name(index): error}) from None


def _decode(source: Source, index: int, grayscale: bool) -> Tensor:
    with source.open(index) as file:
        is_jpeg = file.read(len(_JPEG)) == _JPEG
        file.seek(0)
        if is_jpeg and not grayscale:
            content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
            with suppress(RuntimeError):  # Pillow says what is wrong
                # The pixels of Pillow in two thirds of its time: it decodes to four bytes a pixel, copied twice.
                pixels: Tensor = decode_jpeg(content)
                if len(pixels) == 3:
                    return pixels
                if len(pixels) == 1:
                    return pixels.permute(1, 2, 0).expand(-1, -1, 3).contiguous().permute(2, 0, 1)
            file.seek(0)
        with _open(file) as image:
            return _pixels(image, grayscale)


def _pixels(image: Image.Image, grayscale: bool) -> Tensor:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip at 255 instead of scaling
        pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:  # avoids a Pillow warning
        image = image.convert("RGBA")
    return _to_tensor(image.convert("L" if grayscale else "RGB"))


def _to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an RGB or gray image, (C, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)


def look_at(sources: Sequence[Source], most: int = LOOKED_AT) -> tuple[Counter[tuple[int, int]], bool]:
    """Count the sizes (W, H) of images by their headers, and tell whether all of them are gray.

    Files that cannot be read are passed over.

    Args:
        sources: files.
        most: how many files to read, evenly spaced.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    gray = True
    step, passed = -(-sum(map(len, sources)) // most) or 1, 0
    for source in sources:
        for index in range(-passed % step, len(source), step):
            try:
                with source.open(index) as file, _open(file) as image:
                    sizes[image.size] += 1
                    gray &= image.mode in ("1", "L", "LA") or image.mode.startswith("I")
            except Exception:  # decoding names it
                continue
        passed += len(source)
    return sizes, gray and bool(sizes)


def _open(file: BinaryIO) -> Image.Image:
    return Image.open(file, formats=_FORMATS)  # some of Pillow's other formats, such as EPS, start programs


def unreadable(failures: Mapping[str, Exception], listed: str = "", can_be_left_out: bool = True) -> InputError:
    """Create the error for files that cannot be read. It names at most ten of them.

    Args:
        failures: the error of each file.
        listed: where the others are named.
        can_be_left_out: whether to advise ``skip_corrupt``, if it would help.
    """
    some = "; ".join(f"{file} cannot be read as an image: {_reason(failures[file])}" for file in list(failures)[:10])
    if any(isinstance(error, OSError) and error.errno == errno.ESTALE for error in failures.values()):
        return InputError(f"{some}: start the run again")
    one = len(failures) == 1
    counted = "" if one else f"{len(failures):,} files: "
    more = f"; and {len(failures) - 10:,} more{listed}" if len(failures) > 10 else ""
    advice = "Replace the file or remove it" if one else "Replace the files or remove them"
    if can_be_left_out and all(map(is_corrupt, failures.values())):
        advice += f", or leave {'it' if one else 'them'} out by --data.skip_corrupt true"
    return InputError(f"{counted}{some}{more}. {advice}.")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown image format"  # Pillow's message would repeat the path
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def is_corrupt(error: Exception) -> bool:
    """Whether it is the content of a file that cannot be read, so that the file fails always and everywhere."""
    return not (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL))  # seeking to where no byte is


def decode_all(
    source: Source, size: tuple[int, int], fit: bool, grayscale: bool = False
) -> tuple[Tensor, dict[int, Exception]]:
    """Decode images of equal size into one tensor.

    Args:
        source: N files.
        size: (W, H) in pixels.
        fit: resize and center-crop images of any other size to this size, instead of raising an error.
        grayscale: decode to one channel instead of three.

    Returns:
        (N, C, H, W) uint8, and the errors of the files that cannot be read, by index; their pixels are undefined.

    Raises:
        InputError: if a file has a different size; the message names the first such file.
    """
    width, height = size
    images = torch.empty((len(source), 1 if grayscale else 3, height, width), dtype=torch.uint8)

    def fill(index: int) -> None:
        image = _decode(source, index, grayscale)
        if (found := (image.shape[2], image.shape[1])) != size and not fit:
            raise different_size(source.name(index), found, size)
        images[index] = fitted(image, size)

    return images, _in_threads(fill, len(source))


def failing(source: Source) -> dict[int, Exception]:
    """Decode images without keeping them, and return the errors of those that cannot be read, by index."""
    return _in_threads(lambda index: _decode(source, index, grayscale=False), len(source))


def _in_threads(work: Callable[[int], object], count: int) -> dict[int, Exception]:
    """Do ``work(index)`` for all files, and return the errors of those that cannot be read, in order."""

    def work_from(start: int) -> dict[int, Exception]:
        failures: dict[int, Exception] = {}
        for index in range(start, min(start + 256, count)):
            try:
                work(index)
            except (InputError, MemoryError):  # not for lack of a readable file
                raise
            except Exception as error:
                failures[index] = error
        return failures

    # Threads, because decoders release the GIL; 256 files per task, to limit the overhead of tasks.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            parts = list(pool.map(work_from, range(0, count, 256)))
        finally:
            pool.shutdown(cancel_futures=True)
    return {index: error for part in parts for index, error in part.items()}


def different_size(file: str, size: tuple[int, int], expected: tuple[int, int]) -> InputError:
    """Create the error for a file whose size differs from that of the others."""
    return InputError(
        f"{file} has {size[0]}×{size[1]} pixels where others have {expected[0]}×{expected[1]}: "
        "set --data.image_size to resize all images to the same size"
    )


def fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize and center-crop an image, (C, H, W) uint8, to ``size`` (W, H) with Pillow, unless it has that size."""
    if (image.shape[2], image.shape[1]) == size:
        return image
    pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    return _to_tensor(ImageOps.fit(Image.fromarray(pixels), size, Image.Resampling.BILINEAR))
