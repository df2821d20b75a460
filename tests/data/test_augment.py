"""Batch augmentation against loops over samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcnn_lightning.data.augment import crop_and_flip, flip, normalize, resize


def crop_and_flip_slowly(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Pixel by pixel."""
    expected = torch.zeros_like(images)
    batch, channels, height, width = images.shape
    for b in range(batch):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    source_y = y + int(offsets[b, 0]) - padding
                    source_x = (width - 1 - x if flips[b] else x) + int(offsets[b, 1]) - padding
                    if 0 <= source_y < height and 0 <= source_x < width:
                        expected[b, c, y, x] = images[b, c, source_y, source_x]
    return expected


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    padding=st.integers(0, 4),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_crop_and_flip_equals_the_loop(shape, padding, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, shape, generator=rng).to(dtype)
    offsets = torch.randint(0, 2 * padding + 1, (shape[0], 2), generator=rng)
    flips = torch.rand(shape[0], generator=rng) < 0.5
    cropped = crop_and_flip(images, offsets, flips, padding)
    assert cropped.dtype == dtype
    assert torch.equal(cropped, crop_and_flip_slowly(images, offsets, flips, padding))


def test_the_middle_window_is_the_image_and_two_flips_undo_each_other():
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    middle, none, every = torch.full((4, 2), 3), torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert torch.equal(crop_and_flip(images, middle, none, 3), images)
    assert torch.equal(crop_and_flip(crop_and_flip(images, middle, every, 3), middle, every, 3), images)


def test_flips_of_whole_images():
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    flips = torch.tensor([True, False, False, True])
    nowhere = torch.zeros(4, 2, dtype=torch.int64)
    assert torch.equal(flip(images, flips), crop_and_flip_slowly(images, nowhere, flips, 0))


def test_normalize():
    images = torch.tensor([[[[0, 255]], [[100, 50]]]], dtype=torch.uint8)
    mean, std = torch.tensor([255.0, 50.0]).view(-1, 1, 1), torch.tensor([51.0, 25.0]).view(-1, 1, 1)
    normalized = normalize(images, mean, std)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, torch.tensor([[[[-5.0, 0.0]], [[2.0, 0.0]]]]))
    assert images[0, 0, 0, 1] == 255, "the raw image must not be written to"


@pytest.mark.parametrize("size", [None, 6])
def test_resize_leaves_the_right_size_alone(size):
    images = torch.randint(0, 256, (2, 1, 6, 6), dtype=torch.uint8)
    assert resize(images, size) is images


def test_resize_keeps_flat_images_flat_and_handles_many():
    flat = torch.arange(2050).remainder(256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 6)
    assert torch.equal(resize(flat, 5), flat[:, :, :5, :1].expand(-1, -1, -1, 5))


@pytest.mark.gpu
def test_the_device_is_never_waited_for():
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 9, (128, 2)), torch.rand(128) < 0.5
    constant = torch.full((3, 1, 1), 100.0)
    on_device = [tensor.cuda() for tensor in (images, offsets, flips, constant)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = normalize(crop_and_flip(*on_device[:3], 4), on_device[3], on_device[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), normalize(crop_and_flip(images, offsets, flips, 4), constant, constant))
