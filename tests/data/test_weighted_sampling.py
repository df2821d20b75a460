"""Weighted sampling: each class equally often, and each draw of an image with an augmentation of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcnn_lightning.data import Digits
from pcnn_lightning.data.datasets import Augmentation, MemoryImages
from pcnn_lightning.data.sampling import EpochSampler, balanced_order, decode, encode, generator
from pcnn_lightning.errors import InputError


def test_draws_have_the_closed_form_frequencies():
    """Each of 40,000 draws is of image i with the probability 1 / (3 · n_c); class 2 has no images."""
    counts = torch.tensor([1, 4, 0, 15])
    labels = torch.arange(4).repeat_interleave(counts)[torch.randperm(20, generator=generator(1))]
    orders = [balanced_order(labels, generator(seed)) for seed in range(2000)]
    found = torch.cat(orders).bincount(minlength=20).double() / 40_000
    expected = 1 / (3 * counts[labels].double())
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / 40_000).sqrt()).all()
    assert len({tuple(order.tolist()) for order in orders}) == 2000


@settings(max_examples=50, deadline=None, derandomize=True)
@given(size=st.integers(1, 2**24 - 1), epoch=st.integers(0, 2**15 - 1), seed=st.integers(0, 99))
def test_codes_tell_epoch_image_and_variation(size, epoch, seed):
    indices, variations = torch.randint(size, (2, 5), generator=generator(seed))
    codes = encode(epoch, indices, variations, size)
    found = decode(codes, size)
    assert found[0] == epoch
    assert torch.equal(found[1], indices)
    assert torch.equal(found[2], variations)
    assert (codes >= 0).all()
    assert torch.equal(encode(epoch, indices, indices, size), epoch * size + indices)


def test_an_image_drawn_twice_is_augmented_twice():
    labels = torch.tensor([0] * 63 + [1])
    images = MemoryImages(images=torch.zeros(64, 1, 4, 4, dtype=torch.uint8), labels=labels)
    images.augmentation = Augmentation(0, 100, True, mixup_alpha=1.0)
    sampler = EpochSampler(images, 0, labels=labels)
    sampler.set_epoch(3)
    batch = images.__getitems__(list(sampler))
    rare = batch.labels == 1
    assert 16 < rare.sum() < 48
    assert len(batch.shares[rare].unique()) == rare.sum()
    assert len(batch.offsets.unique(dim=0)) > 60


def test_a_data_module_draws_each_class_equally_often():
    data = Digits(batch_size=10, train_size=1000, weighted_sampling=True)
    labels = data.train_set.labels
    few = torch.cat([(labels > 0).nonzero().flatten(), (labels == 0).nonzero().flatten()[:3]])
    data.__dict__["train_set"] = data.train_set.select(few)
    assert data.class_counts == [3, *labels.bincount().tolist()[1:]]
    seen = torch.cat([batch.labels for batch in data.train_dataloader()])
    assert abs((seen == 0).double().mean() - 0.1) < 4 * (0.09 / len(seen)) ** 0.5


def test_too_many_images_are_refused():
    images = MemoryImages(images=torch.zeros(1, 1, 1, 1, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"^weighted_sampling takes fewer than 2\^24 training images"):
        EpochSampler(images, 0, labels=torch.zeros(1, dtype=torch.int64).expand(2**24))
