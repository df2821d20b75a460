"""Image files of all kinds, whole and broken, against Pillow and against numbers known beforehand."""

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import random_image
from PIL import Image

from pcnn_lightning.data import decode as decoding
from pcnn_lightning.data.decode import decode_all, failing, look_at
from pcnn_lightning.data.sources import Files
from pcnn_lightning.errors import InputError

RGB = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [120, 130, 140]]], dtype=np.uint8)
GREY = np.array([[0, 1], [128, 255]], dtype=np.uint8)


def decode(file: str, **options) -> np.ndarray:
    """The pixels of a file, (H, W, C)."""
    pixels = decoding.decode(Files([file]), 0, **options)
    assert pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy()


def decoded(image: Image.Image, file, **options) -> np.ndarray:
    image.save(file, **options)
    result = decode(str(file))
    assert result.shape[2] == 3
    return result


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "tif", "ppm", "webp"])
def test_lossless_rgb(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    assert np.array_equal(decoded(Image.fromarray(RGB), tmp_path / f"a.{suffix}", **options), RGB)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_equals_pillows_own_decoding(tmp_path, mode):
    file = tmp_path / "a.JPEG"
    random_image(np.random.default_rng(0), 32, 24).convert(mode).save(file, format="JPEG")
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(decode(str(file)), pixels)
    (tensor,), failures = decode_all(Files([str(file)]), (32, 24), fit=False)
    assert failures == {}
    assert tensor.dtype == torch.uint8
    assert np.array_equal(tensor.permute(1, 2, 0), pixels)


@pytest.mark.parametrize(
    ("pixels", "file"),
    [
        (GREY, "grey.png"),
        (GREY > 100, "black-and-white.png"),
        (GREY.astype(np.uint16) * 257, "16 bits.png"),
        (GREY.astype(np.uint16) * 257, "16 bits.tif"),
        (GREY.astype(np.int32) * 257, "32 bits.tif"),
    ],
)
def test_grey_becomes_three_equal_channels_and_is_scaled_to_8_bits(tmp_path, pixels, file):
    expected = np.where(pixels, 255, 0) if pixels.dtype == bool else GREY
    result = decoded(Image.fromarray(pixels), tmp_path / file)
    assert np.array_equal(result, np.stack([expected] * 3, -1))


def test_16_bits_are_rounded_and_not_clipped(tmp_path):
    pixels = np.array([[300, 1000], [32768, 65535]], dtype=np.uint16)
    result = decoded(Image.fromarray(pixels), tmp_path / "a.png")
    assert np.array_equal(result[:, :, 0], np.rint(pixels / 257))


def test_transparency_is_dropped_and_palettes_are_resolved(tmp_path):
    rgba = np.concatenate([RGB, np.full((2, 2, 1), 255, np.uint8)], -1)
    assert np.array_equal(decoded(Image.fromarray(rgba), tmp_path / "rgba.png"), RGB)
    palette = Image.fromarray(RGB).quantize(4)
    assert np.array_equal(decoded(palette, tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))
    assert np.array_equal(decoded(palette, tmp_path / "transparent.png", transparency=b"\x00\xff"), RGB)
    assert np.array_equal(decoded(palette, tmp_path / "a.gif"), RGB)


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(decoded(cmyk, tmp_path / "a.jpg").astype(int) - [0, 255, 255]).max() <= 3


def decode_gray(file: str) -> np.ndarray:
    return decode(file, grayscale=True)


def broken_png() -> bytes:
    data = io.BytesIO()
    random_image(np.random.default_rng(0), 32, 32).save(data, format="PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"not an image", broken_png()[:60], broken_png()[:-200], broken_png()[:200] + b"\0" * 3000]
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_broken_files_are_named(tmp_path, content, suffix):
    file = tmp_path / f"broken é.{suffix}"
    file.write_bytes(content)
    with pytest.raises(
        InputError, match=rf"broken é\.{suffix} cannot be read as an image: .+Replace the file"
    ) as caught:
        decode(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [decode, decode_gray])
@pytest.mark.parametrize("other", ["EPS", "ICO", "JPEG2000", "PCX", "SGI", "TGA"])
def test_other_formats_are_refused_whatever_the_name(tmp_path, monkeypatch, read, other):
    def start(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr("subprocess.Popen", start)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", format=other)
    with pytest.raises(InputError, match=r"a\.png cannot be read as an image: unknown image format"):
        read(str(tmp_path / "a.png"))


def test_the_first_image_of_a_jpeg_of_several_is_taken(tmp_path):
    first, second = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
    result = decoded(first, tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    assert (result == 255).all()


def put_no_file(path, kind: str) -> None:
    """A pipe, socket or device."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("read", [decode, decode_gray])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, monkeypatch, read, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    put_no_file(Path("a.png"), kind)
    with pytest.raises(InputError, match=r"^a\.png cannot be read as an image: not a regular file\. Replace the file"):
        read("a.png")


def test_a_truncated_jpeg_is_refused(tmp_path):
    file = tmp_path / "a.jpg"
    random_image(np.random.default_rng(0), 64, 64).save(file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(InputError, match="truncated"):
        decode(str(file))


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="floating-point"):
        decode(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("read", [decode, decode_gray])
def test_missing_and_unreadable_files_are_named(tmp_path, read):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"gone\.png cannot be read as an image: No such file"):
        read(str(tmp_path / "gone.png"))
    if os.geteuid() != 0:  # root reads everything
        (tmp_path / "locked.png").write_bytes(b"")
        (tmp_path / "locked.png").chmod(0)
        with pytest.raises(InputError, match=r"locked\.png cannot be read as an image: Permission denied"):
            read(str(tmp_path / "locked.png"))


def test_decode_all_keeps_the_order_and_fits_sizes(tmp_path):
    files = []
    for number in range(600):
        files.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (4, 2), (number % 256, number // 256, 0)).save(files[-1])
    images, _ = decode_all(Files(files), (4, 2), fit=False)
    assert images.shape == (600, 3, 2, 4)
    assert images[:, 0, 0, 0].tolist() == [number % 256 for number in range(600)]
    assert images[:, 1, 1, 3].tolist() == [number // 256 for number in range(600)]
    assert torch.equal(decode_all(Files(files[:3]), (3, 3), fit=True)[0], images[:3, :, :1, :1].expand(-1, -1, 3, 3))


def test_decode_all_names_the_first_file_that_differs(tmp_path):
    files = [str(tmp_path / f"{number}.png") for number in range(4)]
    for file, size in zip(files, [(4, 2), (4, 2), (5, 6), (7, 7)], strict=True):
        Image.new("RGB", size).save(file)
    with pytest.raises(InputError, match=r"2\.png has 5×6 pixels .* have 4×2: set --data.image_size"):
        decode_all(Files(files), (4, 2), fit=False)


def test_all_files_that_cannot_be_read_are_returned_in_order_and_the_others_decoded(tmp_path):
    files = [str(tmp_path / f"{number:03d}.png") for number in range(600)]
    broken = files[3], files[299], files[300], files[599]
    for number, file in enumerate(files):
        Image.new("RGB", (4, 2), (number % 256, 0, 0)).save(file)
    for file in broken:
        Path(file).write_bytes(broken_png()[:60])
    images, failures = decode_all(Files(files), (4, 2), fit=False)
    assert tuple(failures) == tuple(failing(Files(files)))
    assert tuple(files[index] for index in failures) == broken
    whole = [number for number, file in enumerate(files) if file not in broken]
    assert images[whole, 0, 0, 0].tolist() == [number % 256 for number in whole]


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "LA", "CMYK"])
def test_gray_is_pillows_own(tmp_path, mode):
    pixels = random_image(np.random.default_rng(0)).convert(mode)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    pixels.save(file)
    (tensor,), _ = decode_all(Files([str(file)]), (8, 8), fit=False, grayscale=True)
    expected = pixels.convert("RGB").convert("L") if mode == "CMYK" else pixels.convert("L")
    assert tensor.shape == (1, 8, 8)
    assert np.abs(tensor[0].numpy().astype(int) - np.asarray(expected)).max() <= (1 if mode == "CMYK" else 0)


def test_headers_tell_sizes_and_whether_all_are_gray(tmp_path):
    files = [str(tmp_path / f"{number}.png") for number in range(6)]
    for file, (mode, size) in zip(
        files, [("L", (4, 2)), ("1", (4, 2)), ("LA", (3, 3)), ("I;16", (4, 2)), ("RGB", (5, 5))], strict=False
    ):
        Image.new(mode, size).save(file)
    Path(files[5]).write_bytes(b"no image")
    assert look_at([Files(files[:4])]) == ({(4, 2): 3, (3, 3): 1}, True)
    assert look_at([Files(files)]) == ({(4, 2): 3, (3, 3): 1, (5, 5): 1}, False)
    assert look_at([Files(files[5:])]) == ({}, False)
    assert look_at([Files(files)], most=2) == ({(4, 2): 2}, True)
    assert look_at([Files([])]) == ({}, False)
