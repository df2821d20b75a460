"""ImageFolder, in memory and from disk."""

import os

import numpy as np
import pytest
import torch
from made_images import make_folder
from PIL import Image
from torchvision.transforms import v2

from pcnn_lightning.data import ImageFolder, encoded
from pcnn_lightning.data.augment import flip
from pcnn_lightning.data.datasets import MemoryImages
from pcnn_lightning.data.decode import look_at
from pcnn_lightning.data.disk import DiskImages
from pcnn_lightning.data.sampling import Stream, mixed_seed
from pcnn_lightning.errors import InputError

TWO = {"cat": 6, "dog": 4}
PLACES = [{}, {"in_memory": True}, {"in_memory": False, "image_size": 8}, {"image_size": 4}]


def pixels(file) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_splits_classes_and_labels(tmp_path, in_memory):
    root = make_folder(tmp_path / "Bilder é", {"train": TWO, "val": {"cat": 1, "dog": 2}, "test": {"cat": 2, "dog": 1}})
    data = ImageFolder(str(root), image_size=8, in_memory=in_memory, val_fraction=0.5)
    assert (data.classes, data.num_classes, data.in_channels) == (["cat", "dog"], 2, 3)
    data.setup("fit")
    data.setup("test")
    assert isinstance(data.train_set, MemoryImages if in_memory else DiskImages)
    assert sorted(data.train_set.labels.tolist()) == [0] * 6 + [1] * 4, "val/ exists, so nothing is held out"
    assert data.val_set.labels.tolist() == [0, 1, 1]
    assert data.test_set.labels.tolist() == [0, 0, 1]
    batch = data.test_set.__getitems__([2, 0])
    assert batch.images.dtype == torch.uint8
    if in_memory:
        assert torch.equal(batch.images[0], pixels(root / "test/dog/000.png"))
        assert torch.equal(batch.images[1], pixels(root / "test/cat/000.png"))


def test_without_val_a_part_of_train_is_held_out(tmp_path):
    root = make_folder(tmp_path, {"train": {"cat": 10, "dog": 20}, "test": TWO})
    data = ImageFolder(str(root), val_fraction=0.1)
    assert data.val_set.labels.bincount().tolist() == [1, 2]
    assert data.train_set.labels.bincount().tolist() == [9, 18]
    assert not set(data.val_set.indices.tolist()) & set(data.train_set.indices.tolist())


def test_single_image_classes(tmp_path):
    data = ImageFolder(str(make_folder(tmp_path, {"train": {"a": 1, "b": 1}})), batch_size=4)
    assert len(data.train_set) == len(data.val_set) == 1
    assert len(list(data.train_dataloader())) == 1
    alone = ImageFolder(str(make_folder(tmp_path / "alone", {"train": {"a": 1}})))
    assert len(alone.train_set) == 1
    assert alone.val_dataloader() == []


def test_it_is_decided_once_for_all_splits_whether_memory_holds_the_images(tmp_path, monkeypatch):
    root = make_folder(tmp_path, {"train": TWO, "test": TWO})
    assert isinstance(ImageFolder(str(root)).test_set, MemoryImages)
    assert isinstance(ImageFolder(str(root), in_memory=False, image_size=8).test_set, DiskImages)
    monkeypatch.setattr(encoded, "MEMORY_LIMIT", 20 * 3 * 8 * 8 - 1)
    assert isinstance(ImageFolder(str(root), image_size=8).test_set, DiskImages)
    with pytest.raises(InputError, match=r"20 images of 8×8 take 3\.8 kB of memory, more than 3\.8 kB: set --data\.im"):
        ImageFolder(str(root)).setup("test")
    assert isinstance(ImageFolder(str(root), image_size=4).test_set, MemoryImages)
    assert isinstance(ImageFolder(str(root), in_memory=True).test_set, MemoryImages)


def test_sizes_that_differ_are_named_with_what_image_size_would_take(tmp_path):
    root = make_folder(tmp_path, {"train": TWO, "test": TWO})
    Image.new("RGB", (9, 5)).save(root / "test/dog/001.png")
    for options in ({}, {"in_memory": True}, {"in_memory": False}):
        with pytest.raises(InputError) as caught:
            ImageFolder(str(root), **options).setup("test")
        # 20 images of 3 · 32², 3 · 64² and 3 · 224² bytes
        assert str(caught.value).startswith(
            "the 20 images are of 2 sizes, from 9×5 to 8×8: set --data.image_size to resize them. "
            "They take 61.4 kB at 32×32, 245.8 kB at 64×64 and 3.0 MB at 224×224"
        )
    images = ImageFolder(str(root), image_size=6).test_set
    assert isinstance(images, MemoryImages)
    assert images.images.shape == (10, 3, 6, 6)


def test_images_on_disk_need_a_size(tmp_path):
    root = make_folder(tmp_path, {"train": TWO})
    with pytest.raises(InputError, match=r"images of 8×8 are to be read from disk: set --data\.image_size"):
        ImageFolder(str(root), in_memory=False).setup("fit")


def test_a_size_that_headers_of_a_sample_do_not_show_is_named(tmp_path, monkeypatch):
    root = make_folder(tmp_path, {"train": TWO})
    Image.new("RGB", (9, 5)).save(root / "train/cat/003.png")
    monkeypatch.setattr(encoded, "look_at", lambda sources: look_at(sources, most=2))
    with pytest.raises(InputError, match=r"cat.003\.png has 9×5 pixels where others have 8×8: set --data\.image_size"):
        ImageFolder(str(root)).setup("fit")


def test_from_disk_evaluation_takes_the_middle(tmp_path):
    root = make_folder(tmp_path, {"test": {"a": 1}}, size=(60, 40))
    images = ImageFolder(str(root), in_memory=False, image_size=28).test_set.__getitems__([0]).images
    expected = Image.open(root / "test/a/000.png").resize((48, 32), Image.Resampling.BILINEAR).crop((10, 2, 38, 30))
    assert np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (500, 20), (20, 500), (80, 60)])
def test_from_disk_training_takes_the_crops_of_torchvision(tmp_path, size):
    root = make_folder(tmp_path, {"train": {"a": 4}}, size=size)
    data = ImageFolder(str(root), in_memory=False, image_size=28, val_fraction=0)
    theirs = v2.Compose([v2.RandomResizedCrop(28), v2.RandomHorizontalFlip()])
    for code in range(20):
        torch.manual_seed(mixed_seed(0, code // 4, Stream.AUGMENTATION, code % 4))
        expected = np.asarray(theirs(Image.open(data.train_set.files.name(code % 4)))).astype(int)
        batch = data.train_set.__getitems__([code])
        image = flip(batch.images, batch.flips)[0].permute(1, 2, 0).numpy()
        assert np.abs(image - expected).max() <= 1


def test_from_disk_training_depends_on_seed_epoch_and_sample_alone(tmp_path):
    root = make_folder(tmp_path, {"train": {"a": 6, "b": 6}}, size=(20, 30))

    def images_of(epoch: int, **options):
        torch.manual_seed(epoch)
        before = torch.get_rng_state()
        data = ImageFolder(str(root), in_memory=False, image_size=16, batch_size=4, val_fraction=0, **options)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        assert torch.equal(torch.get_rng_state(), before)
        images = torch.cat([flip(batch.images, batch.flips) for batch in batches])
        return images, torch.cat([batch.labels for batch in batches])

    (images, labels), (again, labels_again) = images_of(3), images_of(3, num_workers=2)
    assert images.shape == (12, 3, 16, 16)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(images, images_of(4)[0])
    assert not torch.equal(images, images_of(3, seed=1)[0])
    assert not torch.equal(images, images_of(3, flip=False)[0])


def test_prediction_for_the_test_split_and_for_any_folder(tmp_path):
    root = make_folder(tmp_path / "root", {"train": TWO, "test": {"cat": 1, "dog": 2}})
    data = ImageFolder(str(root), batch_size=2)
    assert data.predict_names() == ["cat/000.png", "dog/000.png", "dog/001.png"]
    batches = list(data.predict_dataloader())
    assert [batch.labels for batch in batches] == [None, None]
    assert data.on_after_batch_transfer(batches[0], 0).shape == (2, 3, 8, 8)
    elsewhere = make_folder(tmp_path / "anywhere", {"2024": {"May": 2}, "": {"loose": 1}})
    Image.new("L", (8, 8)).save(elsewhere / "Straße 1.JPG")
    data = ImageFolder(str(root), predict_dir=str(elsewhere))
    assert data.predict_names() == ["2024/May/000.png", "2024/May/001.png", "Straße 1.JPG", "loose/000.png"]
    assert len(data.predict_set) == 4
    assert torch.equal(data.predict_set.__getitems__([3]).images[0], pixels(elsewhere / "loose/000.png"))


def test_prediction_without_any_images(tmp_path):
    root = make_folder(tmp_path / "root", {"train": TWO})
    with pytest.raises(InputError, match="no test images"):
        ImageFolder(str(root)).setup("predict")
    with pytest.raises(InputError, match="nowhere cannot be read as a folder"):
        ImageFolder(str(root), predict_dir=str(tmp_path / "nowhere")).setup("predict")


def test_stages_without_images(tmp_path):
    root = make_folder(tmp_path / "train only", {"train": TWO})
    data = ImageFolder(str(root), val_fraction=0)
    with pytest.raises(InputError, match=r"no test images here\. Use `validate` instead, or add test images"):
        data.test_dataloader()
    with pytest.raises(InputError, match="val_fraction is 0"):
        data.setup("validate")
    root = make_folder(tmp_path / "test only", {"test": TWO})
    with pytest.raises(InputError, match="no train images"):
        ImageFolder(str(root)).setup("fit")


def test_folders_that_are_laid_out_otherwise(tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=rf"{root} has no folder train, val or test: expected .*<class>"):
            ImageFolder(str(root))
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="train has no class folders"):
        ImageFolder(str(tmp_path))


def test_classes_that_differ_between_splits(tmp_path):
    root = make_folder(tmp_path, {"train": {"cat": 1, "dog": 1}, "test": {"cat": 1, "frog": 1, "owl": 1}})
    with pytest.raises(InputError, match=r"test and .*train must have the same .*missing dog; extra frog, owl"):
        ImageFolder(str(root))


def test_all_empty_classes_are_named(tmp_path):
    root = make_folder(tmp_path, {"train": {"cat": 1, "dog": 0, "owl": 0}})
    with pytest.raises(InputError, match=r"train holds no images \(\.jpg, .*\) of 2 of 3 classes: dog, owl"):
        ImageFolder(str(root)).setup("fit")


@pytest.mark.parametrize("options", PLACES)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_file_is_named(tmp_path, options, num_workers):
    root = make_folder(tmp_path, {"train": TWO})
    (root / "train/dog/broken.png").write_bytes((root / "train/dog/000.png").read_bytes()[:100])
    data = ImageFolder(str(root), val_fraction=0, num_workers=num_workers, **options)
    with pytest.raises(InputError, match=r"broken\.png cannot be read as an image"):
        list(data.train_dataloader())


@pytest.mark.parametrize("options", PLACES)
@pytest.mark.parametrize("place", ["train/dog", "val/cat", "test/dog", "predict"])
def test_a_pipe_among_the_images_is_named_and_not_waited_for(tmp_path, options, place):
    root = make_folder(tmp_path, {"train": TWO, "val": TWO, "test": TWO, "predict": {"": 1}})
    os.mkfifo(root / place / "pipe.png")
    data = ImageFolder(str(root), predict_dir=str(root / "predict"), **options)
    loader_of = getattr(data, f"{place.split('/')[0]}_dataloader")
    with pytest.raises(InputError, match=rf"{place}/pipe\.png cannot be read as an image: not a regular file"):
        list(loader_of())


def test_classes_and_folders_within_them_may_be_links(tmp_path):
    root = make_folder(tmp_path, {"train": {"cat": 2}, "elsewhere": TWO})
    (root / "train/dog").symlink_to(root / "elsewhere/dog")
    (root / "train/cat/more").symlink_to(root / "elsewhere/cat")
    (root / "train/all").symlink_to(".")
    data = ImageFolder(str(root), val_fraction=0)
    assert data.classes == ["cat", "dog"]
    assert data.train_set.labels.bincount().tolist() == [8, 4]
    data = ImageFolder(str(root), predict_dir=str(root / "train"))
    assert len(data.predict_set) == 12


def test_validating_needs_no_training_images(tmp_path):
    root = make_folder(tmp_path, {"val": TWO})
    data = ImageFolder(str(root))
    data.setup("validate")
    assert len(data.val_set) == 10


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (3, 8, 10)), ({"image_size": 6}, (3, 6, 6)), ({"image_size": 6, "in_memory": False}, (3, 6, 6))],
)
@pytest.mark.parametrize("grayscale", [True, False])
def test_the_shape_of_images_is_known_before_they_are_read(tmp_path, options, shape, grayscale):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (10, 8)).save(tmp_path / split / "cat" / "0.png")
    data = ImageFolder(str(tmp_path), grayscale=grayscale, **options)
    expected = (1, *shape[1:]) if grayscale else shape
    assert data.image_shape == expected
    assert tuple(data.test_set.__getitems__([0]).images.shape[1:]) == expected
    assert data.on_after_batch_transfer(data.test_set.__getitems__([0]), 0)[0].shape == (1, *expected)


# --- without a folder of the data set -------------------------------------------------------------------------------


def test_the_shape_is_known_without_images(tmp_path):
    data = ImageFolder(str(tmp_path / "nowhere"), num_classes=5, image_size=24)
    assert (data.num_classes, data.image_shape) == (5, (3, 24, 24))
    with pytest.raises(InputError, match="nowhere has no folder train, val or test"):
        data.setup("fit")


def test_a_number_of_classes_must_be_that_of_the_folders(tmp_path):
    root = make_folder(tmp_path, {"train": TWO})
    assert ImageFolder(str(root), num_classes=2).classes == ["cat", "dog"]
    with pytest.raises(
        InputError, match=r"num_classes is 3, but .* has class folders for 2: set --data\.num_classes 2"
    ):
        ImageFolder(str(root), num_classes=3)


def test_named_classes_set_the_labels_and_must_be_there(tmp_path):
    root = make_folder(tmp_path, {"train": TWO})
    data = ImageFolder(str(root), classes=["dog", "cat"], val_fraction=0)
    assert data.train_set.labels.bincount().tolist() == [4, 6]
    with pytest.raises(InputError, match="train must have the folders of the classes cat, owl: missing owl; extra dog"):
        ImageFolder(str(root), classes=["cat", "owl"]).setup("fit")


@pytest.mark.parametrize("in_memory", [None, False])
def test_images_are_predicted_without_a_data_set_as_those_of_its_test_split(tmp_path, in_memory):
    root = make_folder(tmp_path, {"train": TWO, "test": TWO}, size=(14, 10))
    expected = ImageFolder(str(root), image_size=6, in_memory=in_memory).test_set.unlabelled().__getitems__([0, 1])
    data = ImageFolder(
        str(tmp_path / "nowhere"),
        classes=["cat", "dog"],
        predict_dir=str(root / "test"),
        image_size=6,
        in_memory=in_memory,
    )
    assert torch.equal(data.predict_set.__getitems__([0, 1]).images, expected.images)


def test_images_to_predict_look_the_same_from_memory_and_from_disk(tmp_path, monkeypatch):
    root = make_folder(tmp_path, {"train": TWO, "predict": {"": 3}}, size=(14, 10))
    Image.new("RGB", (7, 9), (1, 2, 3)).save(root / "predict" / "other.png")
    sets = []
    for available in (10**6, 10):
        monkeypatch.setattr(encoded, "available_memory", lambda available=available: available)
        sets.append(ImageFolder(str(root), predict_dir=str(root / "predict")).predict_set)
    assert [type(images) for images in sets] == [MemoryImages, DiskImages]
    memory, disk = (images.__getitems__([0, 1, 2, 3]).images for images in sets)
    assert memory.shape == (4, 3, 10, 14)
    assert torch.equal(memory, disk)


def test_images_take_the_given_mean_and_deviation(tmp_path):
    root = make_folder(tmp_path, {"test": TWO})
    data = ImageFolder(str(root), mean=[0.5, 0.0, 1.0], std=[0.5, 1.0, 0.25])
    batch = data.test_set.__getitems__([0])
    found = data.on_after_batch_transfer(batch, 0)[0]
    scaled = batch.images / 255
    expected = (scaled - torch.tensor([0.5, 0, 1]).view(3, 1, 1)) / torch.tensor([0.5, 1, 0.25]).view(3, 1, 1)
    torch.testing.assert_close(found, expected)
