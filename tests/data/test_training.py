"""The data modules under a Lightning Trainer."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from made_images import make_folder
from torch import Tensor, nn

from pcnn_lightning.data import Digits, ImageFolder
from pcnn_lightning.errors import InputError

Seen = list[tuple[int, int, list[int], float]]


class Recorder(LightningModule):
    """Trains a linear layer and remembers what it was given."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(in_features, num_classes))
        self.seen: Seen = []
        self.evaluated = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        self.seen.append((self.current_epoch, batch_idx, labels.tolist(), images.double().sum().item()))
        return nn.functional.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        assert batch[0].dtype == torch.float32
        self.evaluated += len(batch[1])

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert batch.dtype == torch.float32
        return self.layers(batch).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer_for(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return Trainer(**{**quiet, "enable_checkpointing": "callbacks" in options, "num_sanity_val_steps": 0, **options})


def test_an_epoch_of_digits():
    model, data = Recorder(256, 10), Digits()
    trainer = trainer_for(max_epochs=1, num_sanity_val_steps=2)
    trainer.fit(model, datamodule=data)
    assert len(model.seen) == 10
    assert model.evaluated == 2 * 144, "once for Lightning's sanity check, once for the epoch"
    trainer.test(model, datamodule=data, verbose=False)
    predictions = trainer.predict(model, datamodule=data)
    assert len(torch.cat(predictions)) == len(data.predict_names()) == 360


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_epoch_of_a_folder(tmp_path, in_memory):
    root = make_folder(tmp_path, {"train": {"a": 8, "b": 8}, "test": {"a": 2, "b": 3}})
    data = ImageFolder(str(root), image_size=6, in_memory=in_memory, batch_size=4, num_workers=1)
    model, trainer = Recorder(108, data.num_classes), trainer_for(max_epochs=2)
    trainer.fit(model, datamodule=data)
    assert len(model.seen) == 2 * 3
    assert len(torch.cat(trainer.predict(model, datamodule=data))) == 5


def test_no_validation():
    model = Recorder(256, 10)
    trainer_for(max_epochs=1, limit_train_batches=2).fit(model, datamodule=Digits(val_fraction=0))
    assert model.evaluated == 0


def test_overfitting_one_batch():
    model = Recorder(256, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning says that it turns shuffling off
        trainer_for(max_epochs=2, overfit_batches=1, limit_val_batches=0).fit(model, datamodule=Digits(batch_size=8))
    assert model.seen[0][2:] == model.seen[1][2:]


def fit(num_workers: int = 0, ckpt_path: str | None = None, batch_size: int = 8, **options: object) -> Seen:
    """Four epochs of five batches, or what a checkpoint leaves of them."""
    model = Recorder(256, 10)
    data = Digits(batch_size=batch_size, train_size=40, num_workers=num_workers)
    trainer_for(max_epochs=4, **options).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model.seen


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a whole run sees, and a folder of checkpoints of all kinds."""
    folder = tmp_path_factory.mktemp("checkpoints")
    kinds = {
        "step": {"every_n_train_steps": 1},
        "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False, "mode": "max"},  # a key of its own
    }
    callbacks = [
        ModelCheckpoint(folder, filename=kind + "-{step}", auto_insert_metric_name=False, save_top_k=-1, **when)
        for kind, when in kinds.items()
    ]
    seen = fit(callbacks=callbacks)
    assert [step[:2] for step in seen] == [(epoch, batch) for epoch in range(4) for batch in range(5)]
    return seen, folder


@pytest.mark.parametrize(
    ("kind", "steps", "num_workers"),
    [("step", 3, 0), ("step", 7, 1), ("step", 10, 0), ("epoch", 10, 1), ("validation", 5, 0), ("validation", 15, 1)],
)
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(uninterrupted, kind, steps, num_workers):
    seen, folder = uninterrupted
    assert fit(num_workers, str(folder / f"{kind}-{steps}.ckpt")) == seen[steps:]


@pytest.mark.parametrize(("kind", "steps"), [("step", 3), ("step", 5), ("step", 7), ("validation", 5)])
def test_another_batch_size_is_refused_within_an_epoch(uninterrupted, kind, steps):
    with pytest.raises(InputError, match=r"To resume within epoch \d, batch_size × processes must be 8, but got 4"):
        fit(0, str(uninterrupted[1] / f"{kind}-{steps}.ckpt"), batch_size=4)


@pytest.mark.parametrize("batch_size", [4, 20])
def test_another_batch_size_may_begin_with_an_epoch(uninterrupted, batch_size):
    resumed = fit(0, str(uninterrupted[1] / "epoch-10.ckpt"), batch_size=batch_size)
    order = [(epoch, label) for epoch, _, labels, _ in uninterrupted[0][10:] for label in labels]
    assert [(epoch, label) for epoch, _, labels, _ in resumed for label in labels] == order


def test_the_default_dtype_changes_nothing(tmp_path):
    root = str(make_folder(tmp_path, {"train": {"a": 6, "b": 6}}, size=(20, 30)))
    seen = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            folders = [ImageFolder(root, image_size=16, in_memory=in_memory) for in_memory in (True, False)]
            loaders = [(data, data.train_dataloader()) for data in (Digits(flip=True), *folders)]
            seen.append([data.on_after_batch_transfer(batch, 0) for data, loader in loaders for batch in loader])
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
    for other in seen[1:]:
        for (images, labels), (its_images, its_labels) in zip(seen[0], other, strict=True):
            assert its_images.dtype == torch.float32
            assert torch.equal(images, its_images)
            assert torch.equal(labels, its_labels)


def test_limited_and_reloaded_epochs_do_not_shift_the_order(uninterrupted):
    expected = [step for step in uninterrupted[0] if step[1] < 2]
    assert fit(limit_train_batches=2, reload_dataloaders_every_n_epochs=1) == expected


def test_each_process_takes_its_share():
    data = Digits(batch_size=8, train_size=40)
    (alone,) = list(data.train_dataloader())[:1]
    shares = []
    for rank in range(2):
        data = Digits(batch_size=4, train_size=40)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, fit_loop=trainer_for().fit_loop)
        shares.append(next(iter(data.train_dataloader())))
    for whole, first, second in zip(alone, *shares, strict=True):
        if whole is not None:  # of a variation that is not asked for
            assert torch.equal(whole, torch.stack([first, second], 1).flatten(0, 1))


class Writer(Recorder):
    """Leaves what each process saw in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(256, 10)
        self.folder = folder

    def on_train_end(self) -> None:
        torch.save(self.seen, self.folder / f"{self.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_train_on_the_batches_of_one(tmp_path, uninterrupted):
    data = Digits(batch_size=4, train_size=40)
    trainer_for(max_epochs=4, devices=2, strategy="ddp_spawn").fit(Writer(tmp_path), datamodule=data)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for whole, first, second in zip(uninterrupted[0], *shares, strict=True):
        assert whole[:2] == first[:2] == second[:2]
        assert whole[2] == [label for dealt in zip(first[2], second[2], strict=True) for label in dealt]
        assert whole[3] == pytest.approx(first[3] + second[3])
