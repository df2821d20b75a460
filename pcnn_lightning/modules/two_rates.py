"""The loop: one optimizer at two learning rates, stepped by hand, with a guard against divergence."""

import math
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pcnn_lightning.errors import DivergedError, InputError
from pcnn_lightning.schedules import LearningRate, Schedule
from pcnn_lightning.stages import STAGES


class TwoRateModule(LightningModule):
    """Steps one optimizer by hand, whose groups ``kernels`` and ``projections`` learn at η₁ and η₂.

    Both rates are laid over a stage, and begin anew with the next one. A subclass says which parameters are learned
    with η₂, and hands the loss of each batch to :meth:`update`.

    Args:
        eta1: η₁, learning rate of the kernels and of all that is not a projection.
        eta2: η₂, learning rate of the projections.
        schedule: how η₁ changes over a stage: ``constant``, ``multistep``, ``cosine`` or ``exponential``.
        milestones: shares of a stage at which ``multistep`` multiplies by ``decay``.
        decay: factor of ``multistep`` (at each milestone) and ``exponential`` (after each epoch).
        warmup_epochs: epochs of linear rise at the start of a stage.
        projection_schedule: the same for η₂; None follows η₁.
        projection_milestones: the same for η₂; None follows η₁.
        projection_decay: the same for η₂; None follows η₁.
        projection_warmup_epochs: the same for η₂; None follows η₁.
        optimizer: ``sgd`` or ``adam``.
        momentum: momentum of ``sgd``.
        nesterov: whether that momentum is Nesterov's.
        weight_decay: of all that is learned with η₁.
        projection_weight_decay: of all that is learned with η₂.
        accumulate: batches per update; what is left at the end of an epoch makes a smaller update.
        gradient_clip: largest norm of an update's gradient, over both groups; None leaves it.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    second_rate = "projections"
    """What the logs call that which is learned with η₂."""

    def __init__(
        self,
        *,
        eta1: float = 0.1,
        eta2: float = 0.001,
        schedule: Schedule = "multistep",
        milestones: list[float] = [0.3, 0.6, 0.8],  # noqa: B006  (never changed, and shown as it is in --help)
        decay: float = 0.2,
        warmup_epochs: float = 0.0,
        projection_schedule: Schedule | None = None,
        projection_milestones: list[float] | None = None,
        projection_decay: float | None = None,
        projection_warmup_epochs: float | None = None,
        optimizer: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 3e-4,
        projection_weight_decay: float = 0.0,
        accumulate: int = 1,
        gradient_clip: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1 batch per update, but got {accumulate}")
        if gradient_clip is not None and not gradient_clip > 0:
            raise ValueError(f"gradient_clip must be positive or null, but got {gradient_clip}")
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be one of sgd, adam, but got {optimizer!r}")
        for name, value in (("weight_decay", weight_decay), ("projection_weight_decay", projection_weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, but got {value}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), but got {momentum}")
        self.rates = (
            _learning_rate("eta1", "", eta1, schedule, tuple(milestones), decay, warmup_epochs),
            _learning_rate(
                "eta2",
                "projection_",
                eta2,
                schedule if projection_schedule is None else projection_schedule,
                tuple(milestones if projection_milestones is None else projection_milestones),
                decay if projection_decay is None else projection_decay,
                warmup_epochs if projection_warmup_epochs is None else projection_warmup_epochs,
            ),
        )
        self.stage = "binary"
        self.stage_start = 0  # epoch
        self.stage_end: int | None = None  # epoch; None is the end of the run
        self._within_update = False  # whether gradients of some of an update's batches wait for those of the others
        self._pending: dict[str, Tensor] | None = None  # of a checkpoint just loaded
        self._bad_step: Tensor | None = None  # the first step whose loss was no number, on the device
        self._divergence: str | None = None  # what is said of it

    @abstractmethod
    def projection_parameters(self) -> list[nn.Parameter]:
        """What is learned with η₂."""

    def set_stage(self, stage: str) -> None:
        """Put every layer into ``stage``."""
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, but got {stage!r}")
        self.stage = stage

    def begin_stage(self, stage: str, epoch: int) -> None:
        """Go over to ``stage`` at the start of ``epoch``: schedules and the optimizer's memory begin anew."""
        self.set_stage(stage)
        self.stage_start, self.stage_end = epoch, None
        self._optimizer().state.clear()

    def setup(self, stage: str) -> None:
        if any(isinstance(callback, LearningRateFinder) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise InputError("LearningRateFinder looks for one learning rate, but this model has eta1 and eta2")
        if self.trainer.precision in ("16-true", "bf16-true"):
            raise InputError(
                f"trainer.precision {self.trainer.precision} would round the kernels that are being learned: "
                "use 32-true, bf16-mixed or 16-mixed"
            )
        if isinstance(self.trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise InputError(
                f"trainer.strategy {type(self.trainer.strategy).__name__} shards the kernels, of which a layer needs "
                "all for its scale: use ddp"
            )
        for callback in self.trainer.checkpoint_callbacks:
            if getattr(callback, "_train_time_interval", None) is not None:
                raise InputError(
                    "ModelCheckpoint(train_time_interval=...) writes nothing under manual optimization: "
                    "set every_n_train_steps or every_n_epochs"
                )

    def configure_optimizers(self) -> Optimizer:
        projections = self.projection_parameters()
        theirs = {id(parameter) for parameter in projections}
        kernels = [parameter for parameter in self.parameters() if id(parameter) not in theirs]
        groups = [
            {"params": kernels, "name": "kernels", "lr": self.rates[0].base},
            {"params": projections, "name": "projections", "lr": self.rates[1].base},
        ]
        for group, options in zip(groups, self._group_options(), strict=True):
            group.update(options)
        return (torch.optim.SGD if self.hparams["optimizer"] == "sgd" else torch.optim.Adam)(groups)

    def on_train_start(self) -> None:
        if math.isinf(self._stage_epochs()) and any(rate.schedule in ("multistep", "cosine") for rate in self.rates):
            raise InputError(
                "trainer.max_epochs or trainer.max_steps must be set: a multistep or cosine schedule is laid over "
                "the length of a stage"
            )
        # A resumed optimizer comes with the settings it was saved with; the ones asked for now hold.
        for group, options in zip(self._optimizer().param_groups, self._group_options(), strict=True):
            group.update(options)
        self.stage_start = min(self.stage_start, self.current_epoch)  # a loaded network may begin a new run
        self.zero_grad()  # of a run that was broken off in this process
        self._within_update = self._pending is not None
        if self._pending is not None:
            self.restore_pending(self._pending)
            self._pending = None

    def update(self, loss: Tensor, batch_idx: int) -> None:
        """Go back through the ``loss`` of a batch, and step with the last batch of an update."""
        update, position, size = self.update_of(batch_idx)
        if position == 0:
            self._set_rates(update)
        self.watch(loss)
        last = position == size - 1
        with nullcontext() if last else self._no_sync():
            self.manual_backward(loss / size)
        self._within_update = not last
        if last:
            self.step()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (batch_idx + 1) % every == 0:
            self.check_finite()

    def step(self) -> None:
        """Step the optimizer with what has been gathered."""
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Gradients are unscaled here, and not before, under 16-mixed.
        if self.hparams["gradient_clip"] is not None:
            self.clip_gradients(optimizer, self.hparams["gradient_clip"], "norm")

    def on_validation_model_zero_grad(self) -> None:
        if not self._within_update:
            super().on_validation_model_zero_grad()

    def pending(self) -> dict[str, Tensor]:
        """What the batches of an unfinished update have left, by name: equal on all processes, free of loss scale."""
        left = {name: one.grad for name, one in self.named_parameters() if one.grad is not None}
        scale = self._loss_scale()
        return {name: self.trainer.strategy.reduce(grad.clone(), "mean") / scale for name, grad in left.items()}

    def restore_pending(self, pending: dict[str, Tensor]) -> None:
        """Take up an unfinished update where :meth:`pending` left it."""
        for name, parameter in self.named_parameters():
            if name in pending:
                parameter.grad = pending[name].to(parameter) * self._loss_scale()

    def _loss_scale(self) -> float:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._within_update:
            checkpoint["pending"] = self.pending()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._pending = checkpoint.get("pending") if self.is_fitting else None

    def on_train_epoch_end(self) -> None:
        self.check_finite()
        first, second = (group["lr"] for group in self._optimizer().param_groups)
        rates = {"lr/kernels": first, f"lr/{self.second_rate}": second}
        self.log_dict({**rates, "stage": float(STAGES[self.stage])})

    def on_validation_epoch_end(self) -> None:
        self.check_finite()

    # Parts of a step.

    @property
    def is_fitting(self) -> bool:
        """Whether a trainer is attached, and at work on ``fit``."""
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return optimizer

    def _group_options(self) -> list[dict[str, Any]]:
        """What an optimizer is told of each group, the rates aside, which each update sets."""
        shared = {}
        if self.hparams["optimizer"] == "sgd":
            momentum = self.hparams["momentum"]
            shared = {"momentum": momentum, "nesterov": self.hparams["nesterov"] and momentum > 0}
        decays = (self.hparams["weight_decay"], self.hparams["projection_weight_decay"])
        return [{**shared, "weight_decay": decay} for decay in decays]

    def update_of(self, batch_idx: int) -> tuple[int, int, int]:
        """Number of the update that a batch belongs to, the batch's place in it, and how many batches it has."""
        accumulate = self.hparams["accumulate"]
        update, position = divmod(batch_idx, accumulate)
        return update, position, int(min(accumulate, self.trainer.num_training_batches - update * accumulate))

    def _updates_per_epoch(self) -> float:
        batches, accumulate = self.trainer.num_training_batches, self.hparams["accumulate"]
        return math.inf if math.isinf(batches) else math.ceil(batches / accumulate)

    def _stage_epochs(self) -> float:
        """Length of the present stage; infinite if the run has no end."""
        end, max_steps = self.trainer.max_epochs, self.trainer.max_steps
        length = math.inf if end is None or end < 0 else float(end)
        if max_steps >= 0 and not math.isinf(self._updates_per_epoch()):
            length = min(length, max_steps / self._updates_per_epoch())
        if self.stage_end is not None:
            length = min(length, self.stage_end)
        return length - self.stage_start

    def _set_rates(self, update: int) -> None:
        step = 1 / self._updates_per_epoch()
        epoch = self.current_epoch - self.stage_start + update * step
        for group, rate in zip(self._optimizer().param_groups, self.rates, strict=True):
            group["lr"] = rate.at(epoch, self._stage_epochs(), step)

    def _no_sync(self) -> AbstractContextManager[None]:
        model = self.trainer.strategy.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    # Guards.

    def watch(self, loss: Tensor) -> None:
        """Remember the first step whose loss is no number, without waiting for the device."""
        step = torch.where(loss.detach().isfinite(), math.inf, float(self.global_step))
        self._bad_step = step if self._bad_step is None else torch.minimum(self._bad_step, step)

    def check_finite(self) -> None:
        """Look at what :meth:`watch` has seen, waiting for the device.

        Raises:
            DivergedError: if a loss was no number.
        """
        first = torch.tensor(math.inf, device=self.device) if self._bad_step is None else self._bad_step
        self._bad_step = None
        # Of all processes, so that they end together rather than wait for the one that has seen it.
        step = float(self.trainer.strategy.reduce(first, reduce_op="min"))
        if step < math.inf:
            self.diverged(f"the loss became NaN or infinite at step {int(step)}")

    def diverged(self, what: str) -> None:
        """End the run, and say what can be done and which checkpoint is good."""
        if self._divergence is None:
            callback = self.trainer.checkpoint_callback
            kept = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
            self._divergence = (
                f"{what} (epoch {self.current_epoch}, {self.stage} stage). Lower eta1 (now {self.hparams['eta1']}) or "
                f"eta2 ({self.hparams['eta2']}), or set gradient_clip. Last good checkpoint: {kept or 'none yet'}"
            )
        raise DivergedError(self._divergence)  # again, if a callback then tries to save what is left


def _learning_rate(name: str, prefix: str, base: float, schedule: Schedule, *shape: Any) -> LearningRate:
    """A learning rate whose refusals bear the names that its arguments have here."""
    try:
        return LearningRate(base, schedule, *shape)
    except ValueError as error:
        field = "" if "learning rate" in str(error) else prefix
        raise ValueError(f"{name}: {field}{error}") from None
