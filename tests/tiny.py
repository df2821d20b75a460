"""Networks, data and runs that take a second, and callbacks that several tests share."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from pcnn_lightning import MCN, PCNN, Digits

PROGRESSIVE = {"stage": "ternary", "schedule": "cosine", "projection_loss_weight": 1e-3, "center_loss_weight": 1e-3}


def tiny_pcnn(**arguments: Any) -> PCNN:
    defaults = {"in_channels": 1, "backbone": "wrn7", "widths": [2, 2, 2, 2], "projections": 2, "schedule": "constant"}
    return PCNN(**{**defaults, "eta1": 0.05, "eta2": 0.01, **arguments})


def tiny_mcn(**arguments: Any) -> MCN:
    defaults = {"in_channels": 1, "backbone": "mcn8", "widths": [2, 2, 2, 2], "planes": 2, "schedule": "constant"}
    return MCN(**{**defaults, "eta1": 0.05, "eta2": 0.01, **arguments})


class TinyNetwork(nn.Module):
    """A network from outside the package: ReLUs in front of its convolutions, a bias, and a sum."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.main, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = (x + self.main(x)).relu()
        logits: Tensor = self.head(self.last(x).mean(dim=(2, 3)))
        return logits


def tiny_digits(**arguments: Any) -> Digits:
    return Digits(**{"batch_size": 16, "image_size": 8, "train_size": 64, **arguments})


def tiny_trainer(**arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(**{**defaults, **quiet, "num_sanity_val_steps": 0, **arguments})


def fit(model: PCNN | MCN, data: Digits | None = None, ckpt_path: str | None = None, **trainer: Any) -> Trainer:
    runner = tiny_trainer(**trainer)
    runner.fit(model, datamodule=data or tiny_digits(), ckpt_path=ckpt_path)
    return runner


def frozen_norm(layer, x):
    """Batch norm by its running statistics, also in training."""
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=False)


class Stop(Callback):
    """Abort a run after so many updates."""

    def __init__(self, updates):
        self.updates = updates

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.updates:
            raise RuntimeError("killed")


class Save(Callback):
    """Save a checkpoint after each batch, validation and epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint("batch.ckpt")

    def on_validation_end(self, trainer, pl_module):
        trainer.save_checkpoint("validation.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint("epoch.ckpt")


class Decline(Callback):
    """Log an accuracy that falls from epoch to epoch."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/declining", 1.0 - 0.1 * trainer.current_epoch)
