"""What every family of 1-bit classifiers does alike: its network, its losses, its evaluation, its checkpoints."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from pcnn_lightning.backbones import build_backbone
from pcnn_lightning.checkpoints import check_same_tensors, load_checkpoint
from pcnn_lightning.errors import InputError, compile_failed
from pcnn_lightning.layers import QuantizedConv2d
from pcnn_lightning.losses import CenterLoss
from pcnn_lightning.modules.metrics import SampleMean
from pcnn_lightning.modules.two_rates import TwoRateModule


class OneBitClassifier(TwoRateModule):
    """Trains a network with cross-entropy, the loss of its 1-bit layers and, if wanted, center loss.

    Arguments are primitives, so that a checkpoint loads by itself. All other keyword arguments are those of
    :class:`TwoRateModule`. A subclass gives the layers: it calls :meth:`build_network` and names what η₂ learns.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        backbone: a name in ``pcnn_lightning.backbones.BACKBONES``.
        stages: kernel stages: maps of the stem and of each stage; None takes the backbone's own.
        dropout: rate of it, in a backbone that has dropout.
        label_smoothing: of the cross-entropy in training.
        center_loss_weight: γ, weight of the center loss, a sum over an update's samples; 0 is off.
        center_loss_alpha: α, the share of the way that a centre moves in an update.
        center_loss_start: the first epoch with center loss, or ``binary`` for the stage of that name.
        init_from: a checkpoint whose network, stage aside, a new run starts from.
        compile: whether to compile the backbone with ``torch.compile`` for training, once for each stage. On a CPU it
            takes a C++ compiler.
        channels_last: whether the backbone works on channels-last tensors.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    center_loss: CenterLoss | None
    family: str
    """``PCNN`` or ``MCN``, also of a subclass."""
    trained_stages: tuple[str, ...]
    """The stages that a run of this family goes through, in order."""
    layer_loss = "projection_loss"
    """What the logs call the loss of the 1-bit layers."""

    @property
    def train_losses(self) -> tuple[str, ...]:
        """Names of the losses of training, the first of which is the sum of the others."""
        return "loss", "cross_entropy", self.layer_loss, "center_loss"

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        backbone: str = "wrn22",
        stages: list[int] | None = None,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        center_loss_weight: float = 0.0,
        center_loss_alpha: float = 0.5,
        center_loss_start: int | Literal["binary"] = 0,
        init_from: str | None = None,
        compile: bool = False,
        channels_last: bool = False,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, but got {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), but got {label_smoothing}")
        if center_loss_start != "binary" and (not isinstance(center_loss_start, int) or center_loss_start < 0):
            raise ValueError(f"center_loss_start must be an epoch or binary, but got {center_loss_start!r}")
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._memory_format = torch.contiguous_format
        # Checking its arguments would wait for the device in every batch.
        # The means of an epoch are kept here, not by Lightning, so that a checkpoint within the epoch can hold them.
        self.train_means = nn.ModuleDict({name: SampleMean() for name in self.train_losses})
        self.train_means["accuracy"] = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def build_network(
        self, convolution: Callable[..., nn.Module] | None, activation: Callable[[], nn.Module], planes: int
    ) -> None:
        """Build the backbone, and the center loss that goes with it.

        Args:
            convolution: makes a 1-bit layer, as the backbones ask; None builds ordinary ones.
            activation: makes what binarises a layer's input, or ``nn.Identity``.
            planes: channels per map.
        """
        hparams = self.hparams
        self.net = build_backbone(
            hparams["backbone"],
            hparams["num_classes"],
            hparams["in_channels"],
            _plain_convolution if convolution is None else convolution,
            activation,
            stages=hparams["stages"],
            planes=planes,
            dropout=hparams["dropout"],
        )
        weight, alpha = hparams["center_loss_weight"], hparams["center_loss_alpha"]
        classifier = self.net.classifier
        try:
            center_loss = CenterLoss(classifier.out_features, classifier.in_features, weight, alpha)
        except ValueError as error:
            raise ValueError(f"center_loss_{error}") from None  # the name that its argument has here
        self.center_loss = center_loss if weight > 0 else None

    @property
    def one_bit_layers(self) -> list[QuantizedConv2d]:
        """The 1-bit convolutions, from input to output."""
        return [layer for layer in self.net.modules() if isinstance(layer, QuantizedConv2d)]

    def penalty(self) -> Tensor:
        """The loss of all 1-bit layers, each weighted with λ (3.42) or θ (3.18): a scalar."""
        losses = [layer.quantization_loss() for layer in self.one_bit_layers]
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    @property
    def center_loss_now(self) -> CenterLoss | None:
        """The center loss, if it has begun."""
        start = self.hparams["center_loss_start"]
        waits = self.stage == "ternary" if start == "binary" else self.current_epoch < start
        return None if waits else self.center_loss

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, in_channels, H, W)."""
        logits: Tensor = self.net(images)
        return logits

    def _features_of(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype, memory_format=self._memory_format)
        if self._compiled is None or not self.training:
            # Evaluation would compile four times more: for its mode and its smaller last batch, in each stage.
            return cast(Tensor, self.net.features(images))
        try:
            return self._compiled(images)
        except TorchDynamoException as error:
            raise compile_failed(error) from error

    def prepare_features(self, *, compile: bool, channels_last: bool) -> None:
        """Lay out and compile the backbone for training."""
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.net.to(memory_format=self._memory_format)
        self._compiled = torch.compile(self.net.features.forward) if compile else None

    # Training.

    def on_fit_start(self) -> None:
        if self.hparams["init_from"] is not None and self.trainer.ckpt_path is None:
            self._start_from(self.hparams["init_from"])
        self.prepare_features(compile=self.hparams["compile"], channels_last=self.hparams["channels_last"])

    def on_train_start(self) -> None:
        if self.center_loss is not None:
            self.center_loss.gathered = None  # of a run that was broken off in this process
        super().on_train_start()
        self._logged_epoch = -1
        if self.trainer.ckpt_path is not None:  # perhaps of an epoch with no more batches to come, but its end
            self._log_means()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        if batch_idx == 0:
            self._check_labels(labels)  # once an epoch: looking at a label's value waits for the device
            for mean in self._means().values():
                mean.reset()  # a checkpoint from the end of an epoch still holds its means
        # 3.60 is a sum over all samples of an update, while micro-batches and processes are averaged.
        losses, logits = self.losses(images, labels, self.update_of(batch_idx)[2] * self.trainer.world_size)
        loss = torch.stack(list(losses.values())).sum()
        self.update(loss, batch_idx)

        losses = {name: value.detach() for name, value in {"loss": loss, **losses}.items()}
        means = self._means()
        for name, value in losses.items():
            means[name].update(value, len(labels))
        means["accuracy"].update(logits, labels)
        if self._logged_epoch != self.current_epoch:  # once an epoch: what is logged is a metric, not a value
            self._logged_epoch = self.current_epoch
            self._log_means()
        return losses

    def losses(self, images: Tensor, labels: Tensor, averaged: int = 1) -> tuple[dict[str, Tensor], Tensor]:
        """What is learned from, by name, each a weighted scalar, and the logits (B, num_classes).

        Args:
            images: (B, in_channels, H, W).
            labels: (B,).
            averaged: over how many batches the loss of an update is the mean.
        """
        features = self._features_of(images)
        logits = self.net.classifier(features)
        losses = {
            "cross_entropy": F.cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"]),
            self.layer_loss: self.penalty(),
        }
        if (center_loss := self.center_loss_now) is not None:
            losses["center_loss"] = center_loss(features, labels) * averaged
        return losses, logits

    def step(self) -> None:
        super().step()
        if self.center_loss is not None:
            self.center_loss.step()

    def pending(self) -> dict[str, Tensor]:
        gathered = None if self.center_loss is None else self.center_loss.gathered
        if gathered is None:
            return super().pending()
        return {**super().pending(), "gathered": self.trainer.strategy.reduce(gathered, reduce_op="mean")}

    def restore_pending(self, pending: dict[str, Tensor]) -> None:
        super().restore_pending(pending)
        if self.center_loss is not None and "gathered" in pending:
            self.center_loss.gathered = pending["gathered"].to(self.center_loss.centers)

    # Evaluation.

    def on_validation_epoch_start(self) -> None:
        self._evaluation_penalty = self.penalty()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

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
        features = self._features_of(images)
        logits = self.net.classifier(features)
        cross_entropy = F.cross_entropy(logits, labels)
        losses = {
            "loss": cross_entropy + self._evaluation_penalty,
            "cross_entropy": cross_entropy,
            self.layer_loss: self._evaluation_penalty,
        }
        if split == "val" and (center_loss := self.center_loss_now) is not None:
            # Shown on the scale of an update, but no part of the loss.
            batches = self.hparams["accumulate"] * self.trainer.world_size
            losses["center_loss"] = center_loss(features, labels) * batches
        if split == "val":
            self.watch(cross_entropy)
        accuracy = self.val_accuracy if split == "val" else self.test_accuracy
        accuracy.update(logits, labels)
        values = {f"{split}/{name}": value for name, value in losses.items()}
        self.log_dict(values, batch_size=len(labels), sync_dist=True)
        self.log(f"{split}/accuracy", accuracy, batch_size=len(labels), prog_bar=True)

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.check_finite()
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                self.diverged(f"{name} holds NaN or infinite values")
        checkpoint["one_bit"] = {
            "family": self.family,
            "stage": self.stage,
            "stage_start": self.stage_start,
            "optimizer": self.hparams["optimizer"],
            "train_means": {name: self._sums(mean) for name, mean in self._means().items() if mean.update_called},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("one_bit", {})
        if saved.get("family") != self.family:
            raise InputError(
                f"the checkpoint holds a {saved.get('family', 'model that pcnn_lightning did not train')}, "
                f"not a {self.family}"
            )
        check_same_tensors(self.state_dict(), checkpoint["state_dict"])
        if self.is_fitting and (optimizer := saved.get("optimizer")) != self.hparams["optimizer"]:
            raise InputError(
                f"the checkpoint has the state of optimizer {optimizer}, which {self.hparams['optimizer']} "
                "cannot go on from: name the same one, or start a new run with init_from"
            )
        super().on_load_checkpoint(checkpoint)
        try:
            self.restore(saved)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the checkpoint is damaged: what it says of its run is no use ({type(error).__name__}: {error})"
            ) from error

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up the run that :meth:`on_save_checkpoint` has described."""
        for name, state in saved["train_means"].items():
            mean = self._means()[name]
            for part, value in state.items():  # sums over all processes, for one of them to take up
                setattr(mean, part, value.to(self.device) * (self._trainer is None or self.global_rank == 0))
            mean._update_count = 1  # what a metric goes by to tell whether it holds anything
        self.set_stage(saved["stage"])
        self.stage_start, self.stage_end = saved["stage_start"], None  # its end is the callback's to say

    def _means(self) -> dict[str, Metric]:
        return cast(dict[str, Metric], dict(self.train_means.items()))

    def _sums(self, mean: Metric) -> dict[str, Tensor]:
        state = cast(dict[str, Tensor], mean.metric_state)
        return {part: self.trainer.strategy.reduce(value.clone(), reduce_op="sum") for part, value in state.items()}

    def _log_means(self) -> None:
        held = {f"train/{name}": mean for name, mean in self._means().items() if mean.update_called}
        self.log_dict(held, on_step=False, on_epoch=True)

    def _start_from(self, path: str) -> None:
        state = load_checkpoint(path)["state_dict"]
        network = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
        check_same_tensors(self.net.state_dict(), network)
        self.net.load_state_dict(network)

    def _check_labels(self, labels: Tensor) -> None:
        low, high = labels.aminmax()
        classes = self.hparams["num_classes"]
        if low < 0 or high >= classes:
            raise InputError(f"labels must lie in [0, {classes - 1}], but the batch has {int(low)} to {int(high)}")


def _plain_convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, *, planes: int = 1
) -> nn.Conv2d:
    """The full-precision twin of a 1-bit layer, which has no use for planes."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
