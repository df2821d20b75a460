"""A TensorBoard logger with training beside validation, and the stages of a run apart."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pcnn_lightning.losses import LossTerm

RESULTS = "results"
"""The sub-run of what is not a curve: hyperparameters, best and test metrics, and figures."""


class StageLogger(TensorBoardLogger):
    """A TensorBoard logger with a sub-run for training and one for validation in each stage.

    The curves of a quantity share a chart, in different colors: training and validation as ``<stage>/train`` and
    ``<stage>/val``, so that a color begins where a stage begins. The charts that tell how a run converges come first,
    numbered in the order of reading: ``convergence/1_cross_entropy``, ``2_`` the quantization loss, ``3_`` further
    terms of the loss, ``4_accuracy``, ``5_lr_`` the learning rates, ``6_stage`` and, if there are several terms, their
    sum, ``7_loss``. Everything is drawn against batches.

    The sub-run ``results`` has the figures, the best metric of each stage and the test metrics; the page HPARAMS shows
    these beside the hyperparameters, with those first in which runs differ.

    Args:
        save_dir: folder of runs; a run's logs are in ``version_N`` in it.
        name: a folder between ``save_dir`` and ``version_N``; none by default.
        version: number or name of the version; None takes the next number.
        kwargs: further arguments of ``SummaryWriter``.
    """

    def __init__(self, save_dir: str | Path, name: str = "", version: int | str | None = None, **kwargs: Any) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=False, **kwargs)
        self._model: LightningModule | None = None
        self._writers: dict[str, SummaryWriter] = {}

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer of the sub-run ``results``."""
        return self._writer(RESULTS)

    @property
    def training(self) -> SummaryWriter:
        """The writer of training in the current stage."""
        return self._writer(self._sub_run("train"))

    @rank_zero_only
    def log_graph(self, model: LightningModule, input_array: Tensor | None = None) -> None:  # type: ignore[override]
        """Begin a run of ``model``: this is the call by which a Trainer tells a logger what it runs."""
        super().log_graph(model, input_array)
        self._model = model
        if model.trainer.state.fn == TrainerFn.FITTING:
            _, start, _ = hparams(_hyperparameters(model, model.trainer), {})  # type: ignore[no-untyped-call]
            self.experiment._get_file_writer().add_summary(start)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            is_doubled = name in ("train/loss", "val/loss") and len(self._terms) == 1
            if name != "epoch" and not is_doubled:  # Lightning adds the epoch to everything
                run, tag = self._place(name)
                self._writer(run).add_scalar(tag, value, step)

    @rank_zero_only
    def save(self) -> None:
        super().save()
        for writer in self._writers.values():
            writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        for writer in self._writers.values():
            writer.close()

    def _place(self, name: str) -> tuple[str, str]:
        """Sub-run and tag of a metric."""
        kind, _, rest = name.partition("/")
        fitting = self._model is not None and self._model.trainer.state.fn == TrainerFn.FITTING
        if kind in ("best", "test") or (kind == "val" and not fitting):
            return RESULTS, f"{RESULTS}/{kind}_{rest}"
        if kind in ("train", "val"):
            return self._sub_run(kind), f"convergence/{self._rank(rest)}_{rest}"
        if kind == "lr":
            return self._sub_run("train"), f"convergence/5_lr_{rest}"
        return self._sub_run("train"), "convergence/6_stage" if name == "stage" else name

    def _rank(self, name: str) -> int:
        known = {"cross_entropy": 1, "accuracy": 4, "accuracy_top5": 4, "loss": 7}
        term = self._terms.get(name)
        return known.get(name, 3 if term is None or term.depends_on_data else 2)

    @property
    def _terms(self) -> Mapping[str, LossTerm]:
        return getattr(self._model, "terms", {})

    def _sub_run(self, split: str) -> str:
        return "/".join(filter(None, (getattr(self._model, "stage_name", None), split)))

    def _writer(self, run: str) -> SummaryWriter:
        if not self._writers and self._kwargs.get("purge_step") is not None:
            # Of a run that is continued, each sub-run may hold what was logged before it was killed.
            for file in Path(self.log_dir).rglob("events.out.tfevents.*"):
                known = file.parent.relative_to(self.log_dir).as_posix()
                self._writers.setdefault(known, SummaryWriter(str(file.parent), **self._kwargs))
        if run not in self._writers:
            self._writers[run] = SummaryWriter(f"{self.log_dir}/{run}", **self._kwargs)
        return self._writers[run]


def _hyperparameters(model: LightningModule, trainer: Trainer) -> dict[str, Any]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    found = {
        "model": type(model).__name__,
        "data": type(data).__name__ if data is not None else None,
        "batch_size": getattr(data, "batch_size", None),
        "epochs": trainer.max_epochs,
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "precision": trainer.precision,
        "devices": trainer.world_size,
        **{name: value for name, value in model.hparams.items() if not name.startswith("_")},
    }
    return {name: value if type(value) in (bool, int, float) else str(value) for name, value in found.items()}
