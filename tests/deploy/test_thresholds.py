"""Thresholds of batch norm and sign, against a search of all floats around them."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pcnn_lightning.deploy.thresholds import sign_thresholds
from pcnn_lightning.layers import FrozenBatchNorm2d

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-149
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
FACTORS = FLOATS | st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, SMALLEST, -SMALLEST, 1e-30, -1e-30])


def norm_of(scales, shifts):
    norm = FrozenBatchNorm2d(len(scales)).float()
    norm.scale.copy_(torch.tensor(scales))
    norm.shift.copy_(torch.tensor(shifts))
    return norm


def is_positive(norm, x):
    """Whether the norm of each of x (n,) is not negative, for its first channel."""
    return norm(x[:, None, None, None])[:, 0, 0, 0] >= 0


def neighbours(value, count=50):
    """The floats around a value, found by ``nextafter``."""
    found = [value]
    for end in (-torch.inf, torch.inf):
        there = value
        for _ in range(count):
            there = torch.nextafter(there, torch.tensor(end, dtype=torch.float32))
            found.append(there)
    return torch.stack(found)


@settings(deadline=None, max_examples=300)
@given(FACTORS, FACTORS, FLOATS)
@example(0.0, 0.0, 1.0)
@example(0.0, -1.0, 1.0)
@example(-1.0, 0.0, 0.0)
@example(SMALLEST, -1.0, LARGEST)
@example(-3e-39, 3e38, 1.0)
@example(1e38, 1e-30, -SMALLEST)
def test_a_threshold_tells_the_sign_of_a_batch_norm(scale, shift, x):
    norm = norm_of([scale], [shift])
    threshold, falls = sign_thresholds(norm)
    assert threshold.dtype == torch.float32
    assert threshold.shape == falls.shape == (1,)
    others = torch.tensor([x, 0.0, -0.0, SMALLEST, -SMALLEST, LARGEST, -LARGEST], dtype=torch.float32)
    values = torch.cat([neighbours(threshold[0]), neighbours(others[0], 1), others])
    values = values[values.isfinite()]
    assert torch.equal((values >= threshold) != falls, is_positive(norm, values))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([0.1, -0.1, 0.75, -3.0, 1e-20, -1e20]), st.floats(-2, 2, width=32))
def test_a_threshold_is_found_by_walking_there(scale, shift):
    """From the float nearest to the zero of the norm, walk to where its sign changes."""
    norm = norm_of([scale], [shift])
    threshold, _ = sign_thresholds(norm)
    zero = np.float32(-np.float64(np.float32(shift)) / np.float64(np.float32(scale)))
    near = neighbours(torch.tensor(zero)).sort().values
    positive = is_positive(norm, near)
    (change,) = (positive[1:] != positive[:-1]).nonzero(as_tuple=True)
    if len(change) == 1:  # a shift of 1e-45 may be too far away
        assert near[change + 1] == threshold
    else:
        assert abs(shift) < 1e-30


@pytest.mark.parametrize(
    ("scale", "shift", "threshold"),
    [
        (2.0, -1.0, 0.5),
        (-2.0, 1.0, float(np.nextafter(np.float32(0.5), np.float32(1)))),
        (1.0, 0.0, 0.0),
        (-1.0, 0.0, SMALLEST),
        (0.0, -1.0, np.inf),
        (0.0, 1.0, -LARGEST),
    ],
)
def test_known_thresholds(scale, shift, threshold):
    found, falls = sign_thresholds(norm_of([scale], [shift]))
    assert found.item() == threshold
    assert falls.item() == (scale < 0)


@pytest.mark.usefixtures("double_precision")
def test_each_channel_has_its_own_threshold_whatever_the_default_dtype():
    scales, shifts = np.random.default_rng(0).normal(size=(2, 100))
    norm = norm_of(scales, shifts)
    thresholds, falls = sign_thresholds(norm)
    assert thresholds.dtype == torch.float32
    assert 30 < int(falls.sum()) < 70
    x = torch.randn(500, 100, 1, 1, dtype=torch.float32)
    x[:100, :, 0, 0] = thresholds
    assert torch.equal((x[..., 0, 0] >= thresholds) != falls, norm(x)[..., 0, 0] >= 0)
