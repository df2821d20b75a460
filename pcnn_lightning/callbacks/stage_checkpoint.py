"""Saves the best checkpoint of each stage and a record of its metric."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pcnn_lightning.checkpoints import AtomicCheckpointIO
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import check_writable, write_whole
from pcnn_lightning.tables import aligned

RECORD = "stages.json"


class StageCheckpoint(ModelCheckpoint):
    """Keep the best checkpoint of each stage, such as ``ternary.ckpt``, along with ``last.ckpt`` and a record.

    Files are written atomically (:class:`AtomicCheckpointIO`). If the run is stopped within an epoch by SIGTERM or, on
    the command line, Ctrl-C, ``last.ckpt`` is written once more.

    The record, ``stages.json``, holds the best value of ``monitor`` in each stage with its epoch and file, and is
    printed when training ends. Without validation data, the latest epoch of a stage counts as its best. The record is
    of the newest run in the folder: a new run overwrites it at the end of its first epoch, a run resumed from a
    checkpoint in this folder continues it, and a run resumed from another folder starts its own.

    Args:
        dirpath: folder of the checkpoints; None takes the log folder or, on the command line, ``checkpoints`` in
            ``run_dir``, where ``--ckpt_path last`` and ``best`` look for them. Checkpoints of other runs in it are not
            overwritten.
        monitor: name of the metric to compare.
        mode: ``max`` if higher values of ``monitor`` are better, ``min`` if lower ones are.
        save_last: whether to write ``last.ckpt`` after every epoch.

    Raises:
        ValueError: if ``dirpath`` is a remote folder, ``scheme://...``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str = "val/accuracy",
        mode: str = "max",
        save_last: bool = True,
        **others: Any,
    ) -> None:
        if "://" in str(dirpath):  # it would become a local folder of that name
            raise ValueError(f"dirpath must be a local folder, but got {dirpath}")
        super().__init__(dirpath=dirpath, monitor=monitor, mode=mode, save_last=save_last, **others)
        self._state_key = f"{type(self).__name__}({monitor}, {mode})"  # monitor may be set to None later
        self.stages: dict[str, dict[str, Any]] = {}
        self._epoch = 0

    @property
    def state_key(self) -> str:
        return self._state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Now rather than at the first checkpoint, an epoch later.
            check_writable(Path(str(self.dirpath)))
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not sum(trainer.num_val_batches):
            self.monitor = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.filename, self._epoch = str(pl_module.stage), trainer.current_epoch
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)
        self._write_record(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return  # the state restored from a checkpoint may be older than the record
        self.filename, self._epoch = str(pl_module.stage), trainer.current_epoch
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)
        self._write_record(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # Lightning would write a last.ckpt after one batch
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero and self.stages:
            print(f"\n{self.table()}")
            best = {f"best/{stage}": best["value"] for stage, best in self.stages.items() if best["value"] is not None}
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):  # for its "HParams" tab
                    theirs = {name: value for name, value in pl_module.hparams.items() if not name.startswith("_")}
                    logger.log_hyperparams(theirs, best)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if isinstance(exception, SIGTERMException):  # raised between two batches, unlike KeyboardInterrupt
            if trainer.validating:  # a resumed run repeats this validation, whose metrics are not saved
                progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
                for counts in (progress.total, progress.current):
                    vars(counts).update(ready=1, started=1, processed=0, completed=0)
            if self.save_last:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            super().on_exception(trainer, pl_module, exception)

    def table(self) -> str:
        """Format the best value and epoch of each stage as a table, one line per stage."""
        rows = [("stage", f"best {self.monitor or 'is the last'}", "epoch", "checkpoint")]
        for stage, best in self.stages.items():
            value = "" if best["value"] is None else f"{best['value']:.4f}"
            rows.append((stage, value, str(best["epoch"]), best["checkpoint"]))
        return "\n".join(aligned(rows))

    def best_checkpoint(self) -> str | None:
        """Path of the best checkpoint of the last stage recorded in ``dirpath``; None if there is none."""
        record = Path(str(self.dirpath)) / RECORD
        if not record.is_file():
            return None
        try:
            stages = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{record} is damaged ({error}): name a checkpoint in its folder instead") from error
        return str(record.parent / list(stages.values())[-1]["checkpoint"]) if stages else None

    def state_dict(self) -> dict[str, Any]:
        self._note()  # the checkpoint is written before the hooks above return, and must include itself
        return {**super().state_dict(), "stages": self.stages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["dirpath"] == self.dirpath:  # otherwise it names files in another folder
            super().load_state_dict(state_dict)
            self.stages = state_dict["stages"]

    def _save_last(self, trainer: Trainer) -> None:
        # Lightning's save_last writes only together with a new best checkpoint, not after every epoch.
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _note(self) -> None:
        if not self.best_model_path or self.filename is None:  # nothing new in this process
            return
        value = None if self.best_model_score is None else float(self.best_model_score)
        known = self.stages.get(str(self.filename))
        if known is None or value is None or known["value"] != value:
            name = Path(self.best_model_path).name
            self.stages[str(self.filename)] = {"value": value, "epoch": self._epoch, "checkpoint": name}

    def _write_record(self, trainer: Trainer) -> None:
        self._note()
        if self.stages and trainer.is_global_zero:
            write_whole(Path(str(self.dirpath)) / RECORD, f"{json.dumps(self.stages, indent=2)}\n".encode())
