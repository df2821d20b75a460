"""The training loop, written once for every family of 1-bit networks."""

import math
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from pcnn_lightning.backbones import Network
from pcnn_lightning.checkpoints import check_same_tensors, load_checkpoint
from pcnn_lightning.errors import DivergedError, InputError
from pcnn_lightning.losses import CenterLoss
from pcnn_lightning.schedules import LearningRate, Schedule

STAGES = {"full_precision": 0, "ternary": 1, "binary": 2}
"""Stages by name, and the number that each has in the logs."""


class OneBitClassifier(LightningModule):
    """Trains a network with cross-entropy, the penalty of its family and, if wanted, center loss.

    One optimizer holds two named groups, ``kernels`` at η₁ and ``projections`` at η₂, and is stepped by hand. A
    subclass builds ``self.net`` and says which parameters are learned with η₂ and what the penalty is. Arguments are
    primitives, so that a checkpoint loads by itself.

    Args:
        num_classes: number of classes.
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
        label_smoothing: of the cross-entropy in training.
        center_loss_weight: γ, weight of the center loss, a sum over an update's samples; 0 is off.
        center_loss_alpha: α, the share of the way that a centre moves in an update.
        center_loss_start: the first stage with center loss.
        init_from: a checkpoint whose network, stage aside, a new run starts from.
        compile: whether to compile the backbone with ``torch.compile``.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    net: Network
    center_loss: CenterLoss | None
    penalty_name = "projection_loss"

    def __init__(
        self,
        *,
        num_classes: int = 10,
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
        label_smoothing: float = 0.0,
        center_loss_weight: float = 0.0,
        center_loss_alpha: float = 0.5,
        center_loss_start: Literal["ternary", "binary"] = "ternary",
        init_from: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, but got {num_classes}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1 batch per update, but got {accumulate}")
        if gradient_clip is not None and not gradient_clip > 0:
            raise ValueError(f"gradient_clip must be positive or null, but got {gradient_clip}")
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be one of sgd, adam, but got {optimizer!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), but got {label_smoothing}")
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
        # Checking its arguments would wait for the device in every batch.
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self._bad_step: Tensor | None = None  # the first step whose loss was no number, on the device
        self._divergence: str | None = None  # what is said of it

    # What a family fills in.

    @abstractmethod
    def penalty(self) -> Tensor:
        """The family's own loss, weighted and summed over its layers: a scalar."""

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

    # The network and its losses.

    def use_network(self, net: Network) -> None:
        """Take ``net`` for the network to train, with the center loss that goes with it."""
        self.net = net
        weight, alpha = self.hparams["center_loss_weight"], self.hparams["center_loss_alpha"]
        try:
            center_loss = CenterLoss(net.classifier.out_features, net.classifier.in_features, weight, alpha)
        except ValueError as error:
            raise ValueError(f"center_loss_{error}") from None  # the name that its argument has here
        self.center_loss = center_loss if weight > 0 else None

    @property
    def center_loss_of_stage(self) -> CenterLoss | None:
        """The center loss, if the present stage has one."""
        waits = self.stage == "ternary" and self.hparams["center_loss_start"] == "binary"
        return None if waits else self.center_loss

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, in_channels, H, W)."""
        logits: Tensor = self.net(images)
        return logits

    # Training.

    def setup(self, stage: str) -> None:
        if any(isinstance(callback, LearningRateFinder) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise InputError("LearningRateFinder looks for one learning rate, but this model has eta1 and eta2")
        if self.trainer.precision in ("16-true", "bf16-true"):
            raise InputError(
                f"trainer.precision {self.trainer.precision} would round the kernels that are being learned: "
                "use 32-true, bf16-mixed or 16-mixed"
            )

    def configure_optimizers(self) -> Optimizer:
        projections = self.projection_parameters()
        theirs = {id(parameter) for parameter in projections}
        kernels = [parameter for parameter in self.net.parameters() if id(parameter) not in theirs]
        groups = [
            {"params": kernels, "name": "kernels", "lr": self.rates[0].base},
            {"params": projections, "name": "projections", "lr": self.rates[1].base},
        ]
        for group, options in zip(groups, self._group_options(), strict=True):
            group.update(options)
        return (torch.optim.SGD if self.hparams["optimizer"] == "sgd" else torch.optim.Adam)(groups)

    def on_fit_start(self) -> None:
        if self.hparams["init_from"] is not None and self.trainer.ckpt_path is None:
            self._start_from(self.hparams["init_from"])
        if self.hparams["compile"]:
            self.net.features.compile()

    def on_train_start(self) -> None:
        if math.isinf(self._stage_epochs()) and any(rate.schedule in ("multistep", "cosine") for rate in self.rates):
            raise InputError(
                "trainer.max_epochs or trainer.max_steps must be set: a multistep or cosine schedule is laid over "
                "the length of a stage"
            )
        # A resumed optimizer comes with the settings it was saved with; the ones asked for now hold.
        for group, options in zip(self._optimizer().param_groups, self._group_options(), strict=True):
            group.update(options)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        if batch_idx == 0:
            self._check_labels(labels)  # once an epoch: looking at a label's value waits for the device
        update, position, size = self._update_of(batch_idx)
        if position == 0:
            self._set_rates(update)
        features = self.net.features(images.to(self.dtype))
        logits = self.net.classifier(features)
        losses = {
            "cross_entropy": F.cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"]),
            self.penalty_name: self.penalty(),
        }
        if (center_loss := self.center_loss_of_stage) is not None:
            # 3.60 is a sum over all samples of an update, while micro-batches and processes are averaged.
            losses["center_loss"] = center_loss(features, labels) * (size * self.trainer.world_size)
        loss = torch.stack(list(losses.values())).sum()

        self._watch(loss)
        last = position == size - 1
        with nullcontext() if last else self._no_sync():
            self.manual_backward(loss / size)
        if last:
            self._step()

        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._check_finite()
        self.train_accuracy.update(logits, labels)
        losses = {name: value.detach() for name, value in {"loss": loss, **losses}.items()}
        self.log_dict(
            {f"train/{name}": value for name, value in losses.items()},
            on_step=False,
            on_epoch=True,
            batch_size=len(labels),
            sync_dist=True,
        )
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(labels))
        return losses

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Gradients are unscaled here, and not before, under 16-mixed.
        if self.hparams["gradient_clip"] is not None:
            self.clip_gradients(optimizer, self.hparams["gradient_clip"], "norm")

    def on_train_epoch_end(self) -> None:
        self._check_finite()
        kernels, projections = (group["lr"] for group in self._optimizer().param_groups)
        self.log_dict({"lr/kernels": kernels, "lr/projections": projections, "stage": float(STAGES[self.stage])})

    # Evaluation.

    def on_validation_epoch_start(self) -> None:
        self._evaluation_penalty = self.penalty()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._check_finite()

    def on_test_epoch_start(self) -> None:
        self._evaluation_penalty = self.penalty()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Label (B,) and its probability (B,) of each of ``images`` (B, in_channels, H, W)."""
        probabilities, labels = self(images.to(self.dtype)).float().softmax(dim=1).max(dim=1)
        return {"label": labels, "probability": probabilities}

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        features = self.net.features(images.to(self.dtype))
        logits = self.net.classifier(features)
        cross_entropy = F.cross_entropy(logits, labels)
        losses = {
            "loss": cross_entropy + self._evaluation_penalty,
            "cross_entropy": cross_entropy,
            self.penalty_name: self._evaluation_penalty,
        }
        if split == "val" and (center_loss := self.center_loss_of_stage) is not None:
            # Shown on the scale of an update, but no part of the loss.
            batches = self.hparams["accumulate"] * self.trainer.world_size
            losses["center_loss"] = center_loss(features, labels) * batches
        self._watch(cross_entropy)
        accuracy = self.val_accuracy if split == "val" else self.test_accuracy
        accuracy.update(logits, labels)
        values = {f"{split}/{name}": value for name, value in losses.items()}
        self.log_dict(values, batch_size=len(labels), sync_dist=True)
        self.log(f"{split}/accuracy", accuracy, batch_size=len(labels), prog_bar=True)

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_finite()
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                self._diverged(f"{name} holds NaN or infinite values")
        checkpoint["one_bit"] = {
            "family": type(self).__name__,
            "stage": self.stage,
            "stage_start": self.stage_start,
            "optimizer": self.hparams["optimizer"],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("one_bit", {})
        if saved.get("family") != type(self).__name__:
            raise InputError(
                f"the checkpoint holds a {saved.get('family', 'model that pcnn_lightning did not train')}, "
                f"not a {type(self).__name__}"
            )
        check_same_tensors(self.state_dict(), checkpoint["state_dict"])
        if self._is_fitting and saved["optimizer"] != self.hparams["optimizer"]:
            raise InputError(
                f"the checkpoint has the state of optimizer {saved['optimizer']}, which {self.hparams['optimizer']} "
                "cannot go on from: name the same one, or start a new run with init_from"
            )
        self.set_stage(saved["stage"])
        self.stage_start, self.stage_end = saved["stage_start"], None  # its end is the callback's to say

    def _start_from(self, path: str) -> None:
        state = load_checkpoint(path)["state_dict"]
        network = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
        check_same_tensors(self.net.state_dict(), network)
        self.net.load_state_dict(network)

    # Parts of a step.

    @property
    def _is_fitting(self) -> bool:
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

    def _update_of(self, batch_idx: int) -> tuple[int, int, int]:
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

    def _step(self) -> None:
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        if self.center_loss is not None:
            self.center_loss.step()

    # Guards.

    def _check_labels(self, labels: Tensor) -> None:
        low, high = labels.aminmax()
        classes = self.hparams["num_classes"]
        if low < 0 or high >= classes:
            raise InputError(f"labels must lie in [0, {classes - 1}], but the batch has {int(low)} to {int(high)}")

    def _watch(self, loss: Tensor) -> None:
        """Remember the first step whose loss is no number, without waiting for the device."""
        step = torch.where(loss.detach().isfinite(), math.inf, float(self.global_step))
        self._bad_step = step if self._bad_step is None else torch.minimum(self._bad_step, step)

    def _check_finite(self) -> None:
        step, self._bad_step = math.inf if self._bad_step is None else self._bad_step.item(), None
        if step < math.inf:
            self._diverged(f"the loss became NaN or infinite at step {int(step)}")

    def _diverged(self, what: str) -> None:
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
