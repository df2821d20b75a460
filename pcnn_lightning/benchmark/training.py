"""Training steps of a model beside those of its full-precision twin."""

import time
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningDataModule

from pcnn_lightning.benchmark.measure import Report, Setting, Stopwatch, compare_rounds
from pcnn_lightning.modules import PCNN, OneBitClassifier
from pcnn_lightning.modules.two_rates import TwoRateModule


def benchmark_training(model: OneBitClassifier, datamodule: LightningDataModule, setting: Setting) -> Report:
    """Time steps of ``model`` and of its full-precision twin.

    The phases of a step are ``data`` (until a batch is on the device; on a GPU, what the device waits for it),
    ``augment`` (cropping, mirroring and normalising it there), ``forward`` (of all losses), ``backward`` and
    ``optimizer``.

    Args:
        model: what is trained; left on the device, some steps further.
        datamodule: whose training batches are worked through.
        setting: where and how.

    Raises:
        InputError: if there are no images to train on.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    contenders = {type(model).__name__: model, "full precision": twin_of(model)}
    steps = {name: Training(contender, datamodule, setting).step for name, contender in contenders.items()}
    stages = model.hparams["stages"]
    network = model.hparams["backbone"] + ("" if stages is None else f" {'-'.join(map(str, stages))}")
    batch_size = len(datamodule.on_after_batch_transfer(next(_endless(datamodule)), 0)[1])
    report = compare_rounds(f"training step, {network}, batch {batch_size}", batch_size, steps, setting)
    return replace(report, loader=loader_rate(datamodule, setting.device))


def loader_rate(datamodule: LightningDataModule, device: torch.device, seconds: float = 3.0) -> float:
    """Images per second that ``datamodule`` gives when nothing else is to be done: loaded, moved and augmented.

    Args:
        datamodule: whose training batches are counted.
        device: where they are moved and augmented.
        seconds: how long.
    """
    batches = _endless(datamodule)
    next(batches)  # workers start up unseen
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        moved, _ = datamodule.on_after_batch_transfer(move_data_to_device(next(batches), device), 0)
        images += len(moved)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - start)


def twin_of(model: OneBitClassifier) -> PCNN:
    """The network of full precision that has the widths and blocks of ``model``, and ordinary convolutions.

    Losses and optimizer are those of ``model``.
    """
    hparams = dict(model.hparams)
    of_all = {**signature(OneBitClassifier).parameters, **signature(TwoRateModule).parameters}
    shared = {name: value for name, value in hparams.items() if name in of_all}
    planes: int = hparams["projections"] if "projections" in hparams else hparams["planes"]
    return PCNN(full_precision=True, projections=planes, **shared)


class Training:
    """Trains a model step by step without a Trainer: each batch is an update, at the first rates.

    Args:
        model: what is trained.
        datamodule: whose training batches are worked through, again and again.
        setting: where and how.
    """

    def __init__(self, model: OneBitClassifier, datamodule: LightningDataModule, setting: Setting) -> None:
        self._model = model.to(setting.device).train()
        self._model.prepare_features(compile=setting.compiled, channels_last=setting.channels_last)
        self._optimizer = model.configure_optimizers()
        self._scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.precision == "16-mixed")
        self._datamodule, self._setting = datamodule, setting
        self._batches = _endless(datamodule)

    def step(self, watch: Stopwatch) -> None:
        """One step on the next batch, marked by its phases."""
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
        if self._model.center_loss is not None:
            self._model.center_loss.step()
        watch.mark("optimizer")


def _endless(datamodule: LightningDataModule) -> Iterator[Any]:
    loader = datamodule.train_dataloader()
    while True:
        yield from loader
