"""The best checkpoint of each stage, and a record of how good it was."""

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

RECORD = "stages.json"


class StageCheckpoint(ModelCheckpoint):
    """Keep ``ternary.ckpt`` and ``binary.ckpt``, the best epoch of each stage, beside ``last.ckpt`` and a record.

    Files are written whole or not at all (:class:`AtomicCheckpointIO`), and ``last.ckpt`` once more, within an epoch,
    when the run is asked to end by SIGTERM or, on the command line, Ctrl-C.

    The record, ``stages.json``, holds for each stage the best value of ``monitor``, its epoch and its file, and is
    printed when training ends. Without validation data the latest epoch of a stage counts as its best. The record is
    of the newest run in the folder: a new run overwrites it when its first epoch ends, a run resumed from a checkpoint
    of this folder goes on with it, and one resumed from that of another folder begins its own.

    Args:
        dirpath: folder of the checkpoints. Fixed, so that a later process finds them by ``--ckpt_path last`` or
            ``--ckpt_path best``. Checkpoints that another run has left there are not overwritten but numbered around.
        monitor: the metric that decides.
        mode: whether ``max`` or ``min`` of it is best.
        save_last: whether to write ``last.ckpt`` after every epoch.

    Raises:
        ValueError: if ``dirpath`` is a remote folder, ``scheme://...``.
    """

    def __init__(
        self, dirpath: str, monitor: str = "val/accuracy", mode: str = "max", save_last: bool = True, **others: Any
    ) -> None:
        if "://" in str(dirpath):  # which would end as a local folder of that name
            raise ValueError(f"dirpath must be a local folder, but got {dirpath}")
        super().__init__(dirpath=dirpath, monitor=monitor, mode=mode, save_last=save_last, **others)
        self._state_key = f"{type(self).__name__}({monitor}, {mode})"  # monitor may be given up later
        self.stages: dict[str, dict[str, Any]] = {}
        self._epoch = 0

    @property
    def state_key(self) -> str:
        return self._state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # rather than at the first checkpoint, an epoch later
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
            return  # the state restored for it knows no more than the checkpoint that it came with
        self.filename, self._epoch = str(pl_module.stage), trainer.current_epoch
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)
        self._write_record(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # Lightning's own would leave a last.ckpt of one batch
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero and self.stages:
            print(f"\n{self.table()}")
            best = {f"best/{stage}": best["value"] for stage, best in self.stages.items() if best["value"] is not None}
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):  # for its page of hyperparameters
                    theirs = {name: value for name, value in pl_module.hparams.items() if not name.startswith("_")}
                    logger.log_hyperparams(theirs, best)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if isinstance(exception, SIGTERMException):  # raised between two batches, unlike KeyboardInterrupt
            if trainer.validating:  # the run that goes on starts with this validation, whose metrics are not saved
                progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
                for counts in (progress.total, progress.current):
                    vars(counts).update(ready=1, started=1, processed=0, completed=0)
            if self.save_last:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            super().on_exception(trainer, pl_module, exception)

    def table(self) -> str:
        """Best accuracy and epoch of each stage, a line a stage."""
        rows = [("stage", f"best {self.monitor or 'is the last'}", "epoch", "checkpoint")]
        for stage, best in self.stages.items():
            value = "" if best["value"] is None else f"{best['value']:.4f}"
            rows.append((stage, value, str(best["epoch"]), best["checkpoint"]))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def best_checkpoint(self) -> str | None:
        """Best checkpoint of the last stage on record in ``dirpath``, by this or an earlier process."""
        record = Path(str(self.dirpath)) / RECORD
        if not record.is_file():
            return None
        try:
            stages = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{record} is damaged ({error}): name a checkpoint in its folder instead") from error
        return str(record.parent / list(stages.values())[-1]["checkpoint"]) if stages else None

    def state_dict(self) -> dict[str, Any]:
        self._note()  # a checkpoint is written before the hooks above come back, and knows of itself
        return {**super().state_dict(), "stages": self.stages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["dirpath"] == self.dirpath:  # else it names files that are not in this folder
            super().load_state_dict(state_dict)
            self.stages = state_dict["stages"]

    def _save_last(self, trainer: Trainer) -> None:
        # Lightning's own save_last writes only beside a new best, and the last epoch need not be one.
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _note(self) -> None:
        if not self.best_model_path or self.filename is None:  # nothing new since this process began
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
