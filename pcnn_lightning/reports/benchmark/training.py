"""Benchmark of training steps against those of the full-precision twin."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningDataModule

from pcnn_lightning.modules import OneBitClassifier
from pcnn_lightning.reports.benchmark.measure import Report, Setting, Stopwatch, compare_rounds


def benchmark_training(model: OneBitClassifier, datamodule: LightningDataModule, setting: Setting) -> Report:
    """Time training steps of ``model`` and of its full-precision twin.

    The phases of a step are ``data`` (until a batch is on the device; on a GPU, the time that the device waits for it),
    ``augment`` (cropping, flipping and normalizing it there), ``forward`` (including all losses), ``backward`` and
    ``optimizer``.

    Args:
        model: the model to train; it is left on the device, trained for some steps.
        datamodule: provides the training batches.
        setting: where and how to time.

    Raises:
        InputError: if there are no images to train on.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    contenders = {"full precision": model.twin(), type(model).__name__: model}
    steps = {name: Training(contender, datamodule, setting).step for name, contender in contenders.items()}
    widths = model.hparams["widths"]
    network = model.hparams["backbone"] + ("" if widths is None else f" {'-'.join(map(str, widths))}")
    batch_size = len(datamodule.on_after_batch_transfer(next(_endless(datamodule)), 0)[1])
    report = compare_rounds(f"training step, {network}, batch {batch_size}", batch_size, steps, setting)
    return replace(report, loader=loader_rate(datamodule, setting.device))


def loader_rate(datamodule: LightningDataModule, device: torch.device, seconds: float = 3.0) -> float:
    """Images per second that ``datamodule`` can load, move and augment while nothing else runs.

    Args:
        datamodule: provides the training batches.
        device: device that batches are moved to and augmented on.
        seconds: duration of the measurement.
    """
    batches = _endless(datamodule)
    next(batches)  # excludes the start of the workers
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        moved, _ = datamodule.on_after_batch_transfer(move_data_to_device(next(batches), device), 0)
        images += len(moved)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - start)


class Training:
    """Trains a model step by step without a Trainer: each batch is an update, at the initial learning rates.

    Args:
        model: the model to train.
        datamodule: provides the training batches, which are repeated endlessly.
        setting: where and how to time.
    """

    def __init__(self, model: OneBitClassifier, datamodule: LightningDataModule, setting: Setting) -> None:
        self._model = model.to(setting.device).train()
        self._model.load_teacher()
        self._model.prepare_features(compile=setting.compiled, channels_last=setting.channels_last)
        self._optimizer = model.configure_optimizers()
        self._scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.precision == "16-mixed")
        self._datamodule, self._setting = datamodule, setting
        self._batches = _endless(datamodule)

    def step(self, watch: Stopwatch) -> None:
        """Train on the next batch and mark the phases."""
        watch.start()
        batch = move_data_to_device(next(self._batches), self._setting.device)
        watch.mark("data")
        images, labels = self._datamodule.on_after_batch_transfer(batch, 0)
        watch.mark("augment")
        with self._setting.autocast():
            losses, _ = self._model.losses(images, labels)
            loss = torch.stack(list(losses.values())).sum()
        watch.mark("forward")
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        watch.mark("backward")
        if (largest := self._model.hparams["gradient_clip"]) is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), largest)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        for term in self._model.terms.values():
            term.step()
        watch.mark("optimizer")


def _endless(datamodule: LightningDataModule) -> Iterator[Any]:
    loader = datamodule.train_dataloader()
    while True:
        yield from loader
