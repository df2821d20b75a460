"""Digits, and torchvision's data sets from files written in their own formats."""

import gzip
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision import datasets

from pcnn_lightning.data import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST
from pcnn_lightning.errors import InputError

RNG = np.random.default_rng(0)


# --- Digits ---


def test_digits_are_scikit_learns():
    data = Digits(image_size=None, val_fraction=0)
    images = torch.cat([data.train_set.images[data.train_set.indices], data.test_set.images])
    labels = torch.cat([data.train_set.labels, data.test_set.labels])
    originals = load_digits()
    expected = {(image.tobytes(), int(label)) for image, label in zip(originals.data, originals.target, strict=True)}
    found = {
        ((image.flatten().double() * 16 / 255).round().numpy().tobytes(), int(label))
        for image, label in zip(images, labels, strict=True)
    }
    assert found == expected
    assert len(images) == 1797


def test_digits_splits_are_disjoint_and_balanced():
    data = Digits(val_fraction=0.2)
    train, val = data.train_set, data.val_set
    assert (len(train), len(val), len(data.test_set)) == (1150, 287, 360)
    assert not set(train.indices.tolist()) & set(val.indices.tolist())
    assert len({*train.indices.tolist(), *val.indices.tolist()}) == 1437
    for images in (train, val, data.test_set):
        assert images.labels.bincount().min() / len(images) > 0.09


def test_digits_test_images_depend_on_nothing_and_the_others_on_the_seed():
    first, second, other = Digits(), Digits(num_workers=1), Digits(seed=1, val_fraction=0.5, train_size=7)
    assert torch.equal(first.test_set.images, other.test_set.images)
    assert torch.equal(first.val_set.indices, second.val_set.indices)
    assert not torch.equal(first.val_set.indices, Digits(seed=1).val_set.indices)


def test_digits_reach_the_model_normalised():
    data = Digits(batch_size=2000)
    (batch,) = data.train_dataloader()
    images, labels = data.on_after_batch_transfer(batch._replace(offsets=None, flips=None), 0)
    assert (images.shape, images.dtype, labels.dtype) == ((1293, 1, 16, 16), torch.float32, torch.int64)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    assert data.on_after_batch_transfer(batch, 0)[0].shape == images.shape


def test_train_size_takes_a_balanced_part():
    data = Digits(train_size=100)
    assert data.train_set.labels.bincount().tolist() == pytest.approx([10] * 10, abs=1)
    assert torch.equal(data.val_set.indices, Digits().val_set.indices)
    assert set(data.train_set.indices.tolist()) < set(Digits().train_set.indices.tolist())
    assert set(data.train_set.indices.tolist()) != set(Digits(seed=1, train_size=100).train_set.indices.tolist())
    with pytest.raises(ValueError, match=r"train_size must be at most 1293, .*, but got 1294"):
        Digits(train_size=1294).setup("fit")


def test_small_last_batches_are_dropped_unless_there_is_no_other():
    assert [len(batch.labels) for batch in Digits(batch_size=500).train_dataloader()] == [500, 500]
    assert [len(batch.labels) for batch in Digits(batch_size=500).test_dataloader()] == [360]
    assert [len(batch.labels) for batch in Digits(batch_size=500, train_size=3).train_dataloader()] == [3]


def test_predictions_are_named_by_index():
    data = Digits(batch_size=100)
    assert data.predict_names() == [str(index) for index in range(360)]
    assert torch.equal(torch.cat([batch.images for batch in data.predict_dataloader()]), data.test_set.images)


def test_setup_loads_once(monkeypatch):
    loads = []
    monkeypatch.setattr(Digits, "load", lambda self, split, load=Digits.load: loads.append(split) or load(self, split))
    data = Digits()
    for stage in ("fit", "validate", "fit", "test", "predict"):
        data.setup(stage)
    assert loads == ["train", "val", "test"]


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range(monkeypatch, label):
    def load(self, split, load=Digits.load):
        images = load(self, split)
        if images is not None:
            images.labels[5] = label
        return images

    monkeypatch.setattr(Digits, "load", load)
    for stage in ("fit", "test"):
        with pytest.raises(InputError, match=f"has the label {label}; allowed are 0 to 9"):
            Digits().setup(stage)


# --- torchvision's ---


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> None:
    """MNIST's format: a magic number with type 8 (uint8) and rank, then big-endian sizes, then the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for array, name in ((images, f"{prefix}-images-idx3-ubyte"), (labels, f"{prefix}-labels-idx1-ubyte")):
        header = (0x0800 + array.ndim).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / name).write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {}
    for split, prefix, size in (("train", "train", 50), ("test", "t10k", 20)):
        written[split] = RNG.integers(0, 256, (size, 28, 28), dtype=np.uint8), np.arange(size) % 10
        write_idx(root / name / "raw", prefix, *written[split])
    return written


def write_cifar(root: Path, source, label_key: str, num_classes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder = root / source.base_folder
    folder.mkdir()
    written = {}
    for split, files in (("train", source.train_list), ("test", source.test_list)):
        images = RNG.integers(0, 256, (100 * len(files), 3, 32, 32), dtype=np.uint8)
        labels = np.arange(len(images)) % num_classes
        written[split] = images, labels
        for number, (file, _) in enumerate(files):
            part = slice(100 * number, 100 * (number + 1))
            entry = {"data": images[part].reshape(100, -1), label_key: labels[part].tolist()}
            (folder / file).write_bytes(pickle.dumps(entry))
    (folder / source.meta["filename"]).write_bytes(pickle.dumps({source.meta["key"]: [""] * num_classes}))
    return written


def assert_holds(data, written, num_classes: int) -> None:
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.num_classes == len(data.classes) == len(set(data.classes)) == num_classes
    whole = data.train_set.images
    for images, (pixels, _) in ((whole, written["train"]), (data.test_set.images, written["test"])):
        assert images.shape[1] == data.in_channels
        assert np.array_equal(images.squeeze(1), pixels)
    for chosen in (data.train_set, data.val_set):
        assert np.array_equal(chosen.labels, written["train"][1][chosen.indices])
    assert data.test_set.labels.tolist() == written["test"][1].tolist()
    assert len(data.train_set) + len(data.val_set) == len(whole)


@pytest.mark.parametrize("dataset", [MNIST, FashionMNIST])
def test_mnist_files(tmp_path, dataset):
    written = write_mnist(tmp_path, dataset.__name__)
    assert_holds(dataset(root=str(tmp_path)), written, 10)
    resized = dataset(root=str(tmp_path), image_size=14)
    assert resized.test_set.images.shape == (20, 1, 14, 14)


@pytest.mark.parametrize(
    ("dataset", "source", "label_key", "num_classes"),
    [(CIFAR10, datasets.CIFAR10, "labels", 10), (CIFAR100, datasets.CIFAR100, "fine_labels", 100)],
)
def test_cifar_files(tmp_path, monkeypatch, dataset, source, label_key, num_classes):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists())
    assert_holds(dataset(root=str(tmp_path)), write_cifar(tmp_path, source, label_key, num_classes), num_classes)


@pytest.mark.parametrize(
    ("dataset", "module"), [(MNIST, "mnist"), (FashionMNIST, "mnist"), (CIFAR10, "cifar"), (CIFAR100, "cifar")]
)
@pytest.mark.parametrize(
    "error", [OSError("<urlopen error [Errno -2] Name or service not known>"), RuntimeError("a\nb")]
)
def test_no_network(tmp_path, monkeypatch, dataset, module, error):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fail)
    data = dataset(root=str(tmp_path))
    expected = (
        rf"{dataset.__name__} is not in {tmp_path} and could not be downloaded \(.+\); put .*{data.folder}.*--data"
    )
    with pytest.raises(InputError, match=expected) as caught:
        data.prepare_data()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read from"):
        data.setup("fit")


@pytest.mark.parametrize("content", [b"", b"\0" * 40, gzip.compress(b"still packed", mtime=0)])
def test_broken_downloads(tmp_path, content):
    write_mnist(tmp_path, "MNIST")
    (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InputError, match=r"MNIST cannot be read from .*raw"):
        MNIST(root=str(tmp_path)).setup("test")


def test_images_without_labels(tmp_path):
    write_mnist(tmp_path, "MNIST")
    write_idx(tmp_path / "MNIST/raw", "t10k", np.zeros((20, 28, 28)), np.zeros(19))
    with pytest.raises(InputError, match="20 images but 19 labels"):
        MNIST(root=str(tmp_path)).setup("test")


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (Digits, (1, 8, 8)),
        (MNIST, (1, 28, 28)),
        (FashionMNIST, (1, 28, 28)),
        (CIFAR10, (3, 32, 32)),
        (CIFAR100, (3, 32, 32)),
    ],
)
def test_the_shape_of_images_is_known_before_they_are_read(kind, shape):
    assert kind(image_size=None).image_shape == shape
    assert kind(image_size=20).image_shape == (shape[0], 20, 20)
    if kind is Digits:
        assert kind(image_size=None).test_set.images.shape[1:] == shape


@pytest.mark.parametrize("processes", [1, 2, 7])
def test_evaluation_sees_each_image_once_whatever_the_processes(processes):
    seen = {"val": [], "test": []}
    for rank in range(processes):
        data = Digits(batch_size=50)
        data.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
        for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
            seen[split] += list(loader.sampler)
    assert sorted(seen["val"]) == list(range(144))
    assert sorted(seen["test"]) == list(range(360))


def test_fewer_images_than_processes_are_refused():
    data = Digits(val_fraction=0.001)
    data.trainer = SimpleNamespace(world_size=2, global_rank=0)
    with pytest.raises(InputError, match="1 images to evaluate on cannot be dealt out to 2 processes"):
        data.val_dataloader()
