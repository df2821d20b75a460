"""Top-5 accuracy and the confusion matrix of a test, against numpy and scikit-learn."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_digits, tiny_pcnn, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from pcnn_lightning import ConfusionMatrix, ImageDataModule
from pcnn_lightning.data.datasets import MemoryImages


class Many(ImageDataModule):
    """Noise with 30 classes, the last of which no image has."""

    classes = ["true/label", "a,b", "caf\udce9", "$x$", *(f"class {label}" for label in range(4, 30))]
    mean, std, side = (0.5,), (0.25,), 8

    def load(self, split):
        rng = torch.Generator().manual_seed(len(split))
        images = torch.randint(0, 256, (100, 1, 8, 8), generator=rng).to(torch.uint8)
        return MemoryImages(images=images, labels=torch.randint(29, (100,), generator=rng))


def rows_of(name):
    with Path(name).open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("logged", [False, True])
def test_a_test_writes_confusions_classes_and_top5(tmp_path, logged):
    torch.manual_seed(0)
    model, data = tiny_pcnn(num_classes=30), Many(batch_size=32)
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = tiny_trainer(logger=logger if logged else False, callbacks=[ConfusionMatrix()])
    (validated,) = trainer.validate(model, data, verbose=False)
    (found,) = trainer.test(model, data, verbose=False)

    def logits_of(images):
        batch = data.on_after_batch_transfer(images.__getitems__(list(range(100))), 0)
        with torch.no_grad():
            return model.eval()(batch[0]).double().numpy(), batch[1].numpy()

    for metrics, split in ((validated, "val"), (found, "test")):
        logits, labels = logits_of(getattr(data, f"{split}_set"))
        right = sum(int(label in np.argsort(row)[-5:]) for row, label in zip(logits, labels, strict=True))
        assert 0 < right < 100
        assert metrics[f"{split}/accuracy_top5"] == pytest.approx(right / 100)
        assert metrics[f"{split}/accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())

    if not logged:
        assert not list(Path().glob("*.csv")), "there is no folder of the run"
        return
    header, *rows = rows_of(f"{logger.log_dir}/confusion_binary.csv")
    expected = confusion_matrix(labels, logits.argmax(1), labels=range(30))
    names = [name.encode(errors="backslashreplace").decode() for name in data.classes]
    assert header == ["true/predicted", *names]
    assert [row[0] for row in rows] == names
    assert np.array_equal(np.array([row[1:] for row in rows], int), expected)
    header, *rows = rows_of(f"{logger.log_dir}/per_class_binary.csv")
    assert header == ["class", "images", "correct", "accuracy"]
    assert [row[0] for row in rows] == names
    assert rows[29][1:] == ["0", "0", ""]
    for label in range(29):
        mine = logits[labels == label].argmax(1) == label
        assert rows[label][1:3] == [str(len(mine)), str(mine.sum())]
        assert float(rows[label][3]) == pytest.approx(mine.mean())
    assert Path(logger.log_dir, "confusion_binary.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "confusion" in EventAccumulator(logger.log_dir).Reload().Tags()["images"]


def test_few_classes_have_no_top5():
    (found,) = tiny_trainer().test(tiny_pcnn(), tiny_digits(), verbose=False)
    assert set(found) == {"test/accuracy", "test/cross_entropy", "test/projection_loss", "test/loss"}


def test_a_network_of_more_classes_than_the_data(tmp_path):
    """Labels stand for the names."""
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = tiny_trainer(logger=logger, callbacks=[ConfusionMatrix()])
    (found,) = trainer.test(tiny_pcnn(num_classes=12), tiny_digits(), verbose=False)
    header, *rows = rows_of(f"{logger.log_dir}/confusion_binary.csv")
    assert header[1:] == [row[0] for row in rows] == [str(label) for label in range(12)]
    counts = np.array([row[1:] for row in rows], int)
    assert counts[10:].sum() == 0
    assert counts.trace() / counts.sum() == pytest.approx(found["test/accuracy"])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.found = max(self.found, result.numel())
        return result


def test_a_batch_takes_no_memory_but_its_own_in_deterministic_runs():
    """Torch's bincount, and torchmetrics' matrix with it, compares each image with all C² places there."""
    callback, model = ConfusionMatrix(), tiny_pcnn(num_classes=30)
    callback.on_test_start(tiny_trainer(), model)
    labels = torch.arange(60) % 30
    torch.use_deterministic_algorithms(True)
    try:
        with Largest() as largest:
            callback.on_test_batch_end(tiny_trainer(), model, {"predictions": labels, "labels": labels}, None, 0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert 60 <= largest.found <= 900


class Plain(LightningModule):
    """A module from outside the package, without hyperparameters."""

    stage_name = "plain"

    def test_step(self, batch):
        labels = batch[1]
        return {"predictions": labels, "labels": labels}


def test_a_module_without_num_classes_leaves_no_matrix(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    tiny_trainer(logger=logger, callbacks=[ConfusionMatrix()]).test(Plain(), tiny_digits(), verbose=False)
    assert not list(Path(logger.log_dir).glob("confusion*"))
