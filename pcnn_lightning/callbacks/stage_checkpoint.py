"""Saves the best checkpoint of each stage and a record of its metric."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pcnn_lightning.callbacks.monitor import monitored
from pcnn_lightning.checkpoints import use_atomic_io
from pcnn_lightning.checks import check_bool, check_choice
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import check_writable, write_whole
from pcnn_lightning.stages import ENTERING, is_stage_name
from pcnn_lightning.tables import text_table

RECORD, LAST = "stages.json", "last.ckpt"


class StageCheckpoint(ModelCheckpoint):
    """Keep the best checkpoint of each stage, such as ``ternary.ckpt``, along with ``last.ckpt`` and a record.

    ``last.ckpt`` is written at the end of every epoch and, if the run is stopped within an epoch by SIGTERM or, on the
    command line, Ctrl-C, once more. The record, ``stages.json``, holds the best value of ``monitor`` in each stage with
    its epoch and file, and is printed when training ends. As long as a stage has not been validated, its latest epoch
    counts as its best. Files are written whole or not at all, in the order of best, record and last: a run that is
    resumed from ``last.ckpt`` after any of them ends with the same files.

    A run resumed from a checkpoint in ``dirpath`` continues its record; one resumed from elsewhere begins its own. A
    folder with the checkpoints of another run is refused.

    Args:
        dirpath: folder of the checkpoints; None takes ``checkpoints`` in the folder of the run.
        monitor: name of the metric to compare, logged in validation.
        mode: ``max`` if higher values of ``monitor`` are better, ``min`` if lower ones are.
        save_last: whether to write ``last.ckpt``.
        save_weights_only: whether checkpoints are without the state of the optimizer and the run, so that training
            cannot go on from them.

    Raises:
        ValueError: if an argument is not allowed, or ``dirpath`` is a remote folder, ``scheme://...``.
        InputError: when training starts, if the folder cannot be used; after a validation that did not log ``monitor``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str = "val/accuracy",
        mode: str = "max",
        save_last: bool = True,
        save_weights_only: bool = False,
    ) -> None:
        if "://" in str(dirpath):  # it would become a local folder of that name
            raise ValueError(f"dirpath must be a local folder, but got {dirpath}")
        if not isinstance(monitor, str):
            raise ValueError(f"monitor must be the name of a metric, but got {monitor!r}")
        check_choice("mode", mode, ("max", "min"))
        for name, value in (("save_last", save_last), ("save_weights_only", save_weights_only)):
            check_bool(name, value)
        super().__init__(dirpath, monitor=monitor, mode=mode, save_last=save_last, save_weights_only=save_weights_only)
        self.stages: dict[str, dict[str, Any]] = {}
        self._loaded: dict[str, Any] | None = None  # of a checkpoint, until the folder is known
        self._is_reported = False
        self._value: float | None = None  # of a validation at the end of an epoch, until it is saved

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}({self.monitor}, {self.mode})"

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return Path(str(self.dirpath)).resolve()

    @property
    def files(self) -> list[Path]:
        """The checkpoints that this run has written."""
        return [self.folder / name for name in (*(best["checkpoint"] for best in self.stages.values()), LAST)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with warnings.catch_warnings():  # on_fit_start refuses a folder of another run
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Now rather than at the first checkpoint, an epoch later.
            check_writable(self.folder)
            use_atomic_io(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, self._loaded, self._value, self._is_reported = self._loaded, None, None, False
        resumed_from = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve().parent
        if loaded is not None and self.folder in (resumed_from, Path(str(loaded["dirpath"])).resolve()):
            self.stages = loaded["stages"]
        elif trainer.global_step == 0 or loaded is not None:
            self.stages = {}
            # Without collective calls, so that all processes end.
            if not trainer.fast_dev_run and any((self.folder / name).exists() for name in (RECORD, LAST)):  # type: ignore[attr-defined]
                raise InputError(
                    f"{self.folder} holds the checkpoints of another run: "
                    "choose another dirpath, or continue that run with ckpt_path"
                )
        self._remember()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_saving(trainer) or trainer.sanity_checking:
            return
        value = monitored(self, trainer, self.monitor)
        if self._is_better(value, self.stages.get(str(pl_module.stage_name), {}).get("value")):
            if trainer.is_last_batch:
                self._value = value  # the checkpoint is to hold the whole epoch
            else:
                self._save_best(trainer, pl_module, value)
        if _ends_within_epoch(trainer):
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_saving(trainer) or _ends_within_epoch(trainer):
            return
        value, self._value = self._value, None
        if value is not None or self.stages.get(str(pl_module.stage_name), {}).get("value") is None:
            self._save_best(trainer, pl_module, value)
        self._save_last(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # A run that ends within an epoch may be continued there.
        if self._is_saving(trainer) and _ends_within_epoch(trainer):
            if self.stages.get(str(pl_module.stage_name), {}).get("value") is None:
                self._save_best(trainer, pl_module, None)
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_reported:  # the checkpoint is of a run that was killed at its end
            self._report(trainer)
            for logger in trainer.loggers:
                logger.finalize("success")  # again

    def _report(self, trainer: Trainer) -> None:
        self._is_reported = True
        if trainer.is_global_zero and self.stages and self._is_saving(trainer):
            print(f"\n{self.table()}")
            self._log_best(trainer)  # a run that was killed may have lost what it logged before

    def _log_best(self, trainer: Trainer) -> None:
        values = {f"best/{stage}": best["value"] for stage, best in self.stages.items() if best["value"] is not None}
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=trainer.fit_loop.total_batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # SIGTERMException is raised between two batches; after anything else, the state may be half updated.
        if not isinstance(exception, SIGTERMException) or not self._is_saving(trainer) or trainer.sanity_checking:
            return
        if trainer.validating:  # a resumed run repeats this validation, whose metrics are not saved
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            for counts in (progress.total, progress.current):
                vars(counts).update(ready=1, started=1, processed=0, completed=0)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, pl_module)  # the trained weights are to be saved as such
        self._save_last(trainer)

    def table(self) -> str:
        """Format the best value and epoch of each stage as a table, one line per stage."""
        rows = [("stage", f"best {self.monitor}", "epoch", "checkpoint")]
        for stage, best in self.stages.items():
            value = "not validated" if best["value"] is None else f"{best['value']:.4f}"
            rows.append((stage, value, str(best["epoch"]), best["checkpoint"]))
        return text_table(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"dirpath": self.dirpath, "stages": self.stages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = {name: state_dict[name] for name in ("dirpath", "stages")}

    def _is_better(self, value: float, best: float | None) -> bool:
        return not math.isnan(value) and (best is None or (value > best if self.mode == "max" else value < best))

    def _is_saving(self, trainer: Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _save_best(self, trainer: Trainer, pl_module: LightningModule, value: float | None) -> None:
        stage = str(pl_module.stage_name)
        file = f"{stage}.ckpt"
        # Noted first, because the checkpoint holds this note as well.
        self.stages[stage] = {"value": value, "epoch": trainer.current_epoch, "checkpoint": file}
        self._remember()
        trainer.save_checkpoint(self.folder / file, self.save_weights_only)
        if trainer.is_global_zero:
            write_whole(self.folder / RECORD, f"{json.dumps(self.stages, indent=2)}\n".encode())
            self._log_best(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if self.save_last:
            self.last_model_path = str(self.folder / LAST)
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)

    def _remember(self) -> None:
        """Set what Lightning and loggers read of a ModelCheckpoint."""
        best = list(self.stages.values())[-1] if self.stages else {"checkpoint": "", "value": None}
        self.best_model_path = str(self.folder / best["checkpoint"]) if best["checkpoint"] else ""
        self.best_model_score = None if best["value"] is None else torch.tensor(best["value"])


def _ends_within_epoch(trainer: Trainer) -> bool:
    """Whether training ends after this batch, by ``max_steps`` or ``should_stop``, and others of the epoch are left."""
    loop = trainer.fit_loop
    ends = loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early)
    return ends and not trainer.is_last_batch


def best_checkpoint(folder: Path) -> Path | None:
    """Path of the best checkpoint of the last stage in the record of ``folder``; None if there is no record.

    Raises:
        InputError: if the record is damaged.
    """
    record = folder / RECORD
    if not record.is_file():
        return None
    try:
        stages = json.loads(record.read_text(encoding="utf-8"))
        names = [str(Path(stages[stage]["checkpoint"])) for stage in stages]
        known = all(is_stage_name(stage.removeprefix(ENTERING)) for stage in stages)
        if not names or not known or any(Path(name).name != name for name in names):
            raise ValueError("it does not name the checkpoint of each stage")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"{record} is damaged ({error}): name a checkpoint in its folder instead") from None
    return folder / names[-1]
