"""Training through a plan of stages."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pcnn_lightning.callbacks.monitor import monitored
from pcnn_lightning.checks import check_integer
from pcnn_lightning.errors import InputError
from pcnn_lightning.stages import ENTERING, Stage, StagedModule, check_length, named


class StagePlan(Callback):
    """Train a network through several stages in one run, such as real, ternary and binary kernels.

    Each stage has its length, and may override learning rates, schedules, optimizer and weight decay of the model;
    see :class:`Stage`. The same stage may come again, as a warm restart. At a boundary, the latent weights are kept,
    the optimizer begins anew, learning rate schedules restart, and the best metric is reset, so that the best
    checkpoint of the run is one of its last stage. Stages are called after their kind; the second binary one is
    ``binary_2``. While the layers enter a stage one after the other, it is called ``to_binary``, and has a best
    checkpoint of its own.

    The module owns the stage, and saves and restores it; this callback only decides when it ends. A full-precision twin
    is left unchanged, and trains as long as all stages together.

    Args:
        stages: the stages in their order.
        patience: end a stage earlier if ``monitor`` has not risen for this many validations of it; None never does. The
            ends of the stages after it stay where they are.
        monitor: the metric to watch; higher is better.

    Raises:
        ValueError: if an argument is not allowed, or the shares of the stages add up to more than 1.
        InputError: when training starts, if the model cannot be trained in a stage, or the stages do not fit into the
            run.
    """

    may_end_early = False
    """Whether a run may end before the last stage: it then warns."""

    def __init__(self, stages: list[Stage], patience: int | None = None, monitor: str = "val/accuracy") -> None:
        super().__init__()
        if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, Stage) for stage in stages):
            raise ValueError(f"stages must be a list of at least one Stage, but got {stages!r}")
        if patience is not None:
            check_integer("patience", patience, 1)
        if not isinstance(monitor, str):
            raise ValueError(f"monitor must be the name of a metric, but got {monitor!r}")
        self.stages = named(stages)
        self.names = list(self.stages)
        for name in self.names[:-1]:
            if self.stages[name].epochs is None:
                raise ValueError(f"stage {name} must have epochs, since only the last one may take the rest")
        shares = sum(one.epochs for one in self.stages.values() if one.epochs is not None and one.epochs < 1)
        if shares > 1 + 1e-9 or (shares > 1 - 1e-9 and self.stages[self.names[-1]].epochs is None):
            raise ValueError(
                f"epochs: the shares of the stages leave nothing for all of them: they add up to {shares:g}"
            )
        self.patience, self.monitor = patience, monitor
        self.best = float("-inf")
        self.validations_since_best = 0
        self._has_warned = False  # that the run ends before the last stage

    def concerns(self, module: StagedModule) -> bool:
        """Whether the module has stages to go through: a full-precision network has not."""
        return module.trained_stages != ("full_precision",)

    def begin_run(self, module: StagedModule) -> None:
        """Put a new run into its first stage."""
        name = self.names[0]
        if self.stages[name].layer_by_layer:  # from a real network
            module.take_stage("real", Stage("real", activations="real"))
        module.take_stage(name, self.stages[name])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = cast(StagedModule, pl_module)
        if sum(isinstance(callback, StagePlan) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise InputError("a run can have one StagePlan or StageSwitch only, but has several")
        if not self.concerns(module):
            return
        self.check(module, trainer)
        module.next_plan = self.stages
        if trainer.ckpt_path is None and trainer.global_step == 0:
            self.begin_run(module)

    def check(self, module: StagedModule, trainer: Trainer) -> None:
        """Require that the module can be trained in each stage, and that the stages fit into the run.

        Raises:
            InputError: names the stage, and what is allowed.
        """
        try:
            for stage, one in self.stages.items():
                module.check_stage(stage, one)
        except ValueError as error:
            raise InputError(str(error)) from None
        name, last, epochs = type(self).__name__, self.names[-1], _epochs_of(trainer)
        if epochs < 0 and any(one.epochs is not None and one.epochs < 1 for one in self.stages.values()):
            raise InputError(f"{name} with shares of the run needs trainer.max_epochs to be set")
        if epochs < 0 and self.stages[last].layer_by_layer:
            raise InputError(f"stage {last}: layer_by_layer needs trainer.max_epochs to be set")
        if trainer.fast_dev_run or epochs == 0:  # type: ignore[attr-defined]
            return
        first_epochs, end = self._boundaries(epochs)
        if end is not None and end != epochs:
            raise InputError(
                f"the stages of {name} end at epoch {end}, but trainer.max_epochs is {epochs}: "
                "change one of them, or leave out the epochs of the last stage"
            )
        if 0 < epochs <= first_epochs[-1] and not self.may_end_early:
            raise InputError(f"stage {last} begins at epoch {first_epochs[-1]}, but trainer.max_epochs is {epochs}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(StagedModule, pl_module)
        name = type(self).__name__
        if not module.plan:
            kinds = ", ".join(module.trained_stages)
            rank_zero_info(f"{name} has nothing to do: {type(module).__name__} has only the stages {kinds}")
            return
        epochs = _epochs_of(trainer)
        self.first_epochs, _ = self._boundaries(epochs)
        index = self._index(module)
        module.stage_end = self._end(index)
        if index < len(self.stages) - 1:
            self._has_warned = self.patience is None and self._warn_if_short(trainer, module, epochs)

    def _boundaries(self, epochs: int) -> tuple[list[int], int | None]:
        """The first epoch of each stage, and that after the last one; None if it takes the rest of the run."""
        ends, exact = [0], 0.0
        for stage in self.stages.values():
            if stage.epochs is None:
                return ends, None
            exact += stage.epochs * epochs if stage.epochs < 1 else stage.epochs
            ends.append(max(ends[-1] + 1, round(exact)))
        return ends[:-1], ends[-1]

    def _index(self, module: StagedModule) -> int:
        return self.names.index(module.stage_name.removeprefix(ENTERING))

    def _end(self, index: int) -> int | None:
        return self.first_epochs[index + 1] if index + 1 < len(self.stages) else None

    def _warn_if_short(self, trainer: Trainer, module: StagedModule, epochs: int) -> bool:
        """Warn if the run ends before the last stage, and return whether it does."""
        if math.isinf(trainer.num_training_batches):
            return False
        updates = -(-trainer.num_training_batches // module.hparams.get("accumulate", 1))
        trained = len(self.stages)
        if epochs >= 0:
            trained = min(trained, sum(first < epochs for first in self.first_epochs))
            end = f"trainer.max_epochs {epochs}"
        if trainer.max_steps >= 0:
            by_steps = sum(first * updates < trainer.max_steps for first in self.first_epochs)
            if by_steps < trained:
                trained, end = by_steps, f"trainer.max_steps {trainer.max_steps}"
        if trained == len(self.stages):
            return False
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            first, names = self.first_epochs[trained], ", ".join(self.names[:trained])
            rank_zero_warn(
                f"{end} ends this run before stage {self.names[trained]} begins at epoch {first} "
                f"(step {first * updates:.0f}): only {names} is trained"
            )
        return True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        module = cast(StagedModule, pl_module)
        if batch_idx > 0 or not module.plan:  # not on_train_epoch_start, skipped when resuming from an epoch's end
            return
        epoch, index = trainer.current_epoch, self._index(module)
        reached = sum(first <= epoch for first in self.first_epochs) - 1
        if self.patience is not None and self.validations_since_best >= self.patience:
            reached = max(reached, min(index + 1, len(self.stages) - 1))
        if reached > index:
            module.begin_stage(self.names[reached], epoch)
            module.stage_end = self._end(reached)
            self.best, self.validations_since_best = float("-inf"), 0
            forget_best(trainer)
        self._enter_layers(trainer, module)

    def _enter_layers(self, trainer: Trainer, module: StagedModule) -> None:
        """Let as many layers enter the stage as its epoch says."""
        if module.has_entered:
            return
        stage, count = self.stages[self.names[self._index(module)]], len(module.one_bit_layers)
        start, end = module.stage_start, module.stage_end or trainer.max_epochs
        entered = stage.layers_entered(count, trainer.current_epoch - start, end - start)  # type: ignore[operator]
        module.enter_layers(entered)
        restart_early_stopping(trainer)  # the network was better before
        if entered == count:
            forget_best(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(StagedModule, pl_module)
        waits = self.patience is not None and module.plan and module.stage_name in self.names[:-1]
        if not waits or trainer.sanity_checking:
            return
        value = monitored(self, trainer, self.monitor)
        if value > self.best:
            self.best, self.validations_since_best = value, 0
        else:
            self.validations_since_best += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(StagedModule, pl_module)
        if not module.plan or self._has_warned or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if (index := self._index(module)) < len(self.stages) - 1:
            name, first = self.names[index + 1], self.first_epochs[index + 1]
            rank_zero_warn(f"the run has ended before stage {name} at epoch {first}: it is {module.stage_name}")
        elif not module.has_entered:
            rank_zero_warn(f"the run has ended before all layers have entered stage {module.stage}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "validations_since_best": self.validations_since_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.validations_since_best = state_dict["best"], state_dict["validations_since_best"]


class StageSwitch(StagePlan):
    """Switch a ternary network to binary between two epochs of a run (Algorithm 3): the simplest plan.

    Modules without a ternary stage, such as MCN, are left unchanged. A run that ``max_epochs`` or ``max_steps`` ends
    before the switch, such as a short trial, warns and stays ternary.

    Args:
        epoch: the first binary epoch or, below 1, its position as a fraction of ``max_epochs``: rounded, and at least
            1. Schedules of the ternary stage span the epochs before it.
        patience: switch earlier if ``monitor`` has not risen for this many validations; None never does.
        monitor: the metric to watch; higher is better.

    Raises:
        ValueError: if ``epoch`` or ``patience`` is not positive.
        InputError: when training starts, if the model is binary from the first epoch, or a share has no ``max_epochs``.
    """

    may_end_early = True

    def __init__(self, epoch: float, patience: int | None = None, monitor: str = "val/accuracy") -> None:
        check_length("epoch", epoch)
        super().__init__([Stage("ternary", epochs=epoch), Stage("binary")], patience, monitor)

    def concerns(self, module: StagedModule) -> bool:
        return "ternary" in module.trained_stages

    def begin_run(self, module: StagedModule) -> None:
        if module.stage != "ternary":
            raise InputError(f"StageSwitch needs a model with stage: ternary, but the model's is {module.stage}")
        super().begin_run(module)


def _epochs_of(trainer: Trainer) -> int:
    """``max_epochs``; -1 for a run without an end."""
    return -1 if trainer.max_epochs is None else trainer.max_epochs


def restart_early_stopping(trainer: Trainer) -> None:
    """Let early stopping wait anew, for a metric better than from now on."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(float("inf" if callback.mode == "min" else "-inf"))


def forget_best(trainer: Trainer) -> None:
    """Reset the best metric of checkpoints and early stopping. Files that are already written stay."""
    restart_early_stopping(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            callback.best_model_score = None
            callback.best_model_path = ""
            callback.best_k_models = {}
            callback.kth_best_model_path = ""
            callback.kth_value = torch.tensor(float("inf" if callback.mode == "min" else "-inf"))
