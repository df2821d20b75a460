"""What a checkpoint holds of a run beside weights and optimizer, so that the run can go on bit for bit."""

from collections.abc import Iterator
from typing import Any, Protocol

from lightning.pytorch import Trainer
from torch import Tensor, nn

from pcnn_lightning.checkpoints import check_same_tensors
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules.metrics import EpochMeans
from pcnn_lightning.stages import StagedModule

Pending = dict[str, dict[str, Tensor]]
"""State of an unfinished update: gradients, and the state of each term and of each layer."""


class ResumableModule(StagedModule, Protocol):
    """A module whose runs can be resumed within an update."""

    family: str
    train_means: EpochMeans

    @property
    def trainer(self) -> Trainer: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Tensor]: ...


def save_run(module: ResumableModule) -> dict[str, Any]:
    """The record of a run, which checkpoints hold as ``one_bit``."""
    return {
        "family": module.family,
        "class_path": f"{type(module).__module__}.{type(module).__qualname__}",
        "stage": module.stage,
        "stage_start": module.stage_start,
        "optimizer": module.hparams["optimizer"],
        "train_means": module.train_means.sums(module.trainer.strategy),
    }


def check_run(module: ResumableModule, checkpoint: dict[str, Any], fitting: bool) -> None:
    """Check that a model can go on from a checkpoint.

    Raises:
        InputError: names what differs.
    """
    saved = checkpoint.get("one_bit", {})
    if saved.get("family") != module.family:
        held = saved.get("family", "model that pcnn_lightning did not train")
        raise InputError(f"the checkpoint holds a {held}, not a {module.family}")
    check_same_tensors(module.state_dict(), checkpoint["state_dict"])
    if fitting and (optimizer := saved.get("optimizer")) != (wanted := module.hparams["optimizer"]):
        raise InputError(
            f"the checkpoint has the state of optimizer {optimizer}, which {wanted} cannot go on from: "
            "name the same one, or start a new run with init_from"
        )


def pending_update(module: ResumableModule) -> Pending:
    """State of an unfinished update, equal on all processes and without loss scale."""
    scale, reduce = _loss_scale(module.trainer), module.trainer.strategy.reduce
    parts = {
        "gradients": {name: one.grad / scale for name, one in module.named_parameters() if one.grad is not None},
        **{f"terms.{name}": term.pending() for name, term in module.terms.items()},
        **{f"layers.{name}": layer.pending() for name, layer in module.one_bit_layers.items()},
    }
    return {
        part: {name: reduce(value.clone(), "mean") for name, value in values.items()} for part, values in parts.items()
    }


def restore_update(module: ResumableModule, pending: Pending) -> None:
    """Restore what :func:`pending_update` returned; an empty dictionary restores the start of an update."""
    gradients = pending.get("gradients", {})
    for name, parameter in module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter) * _loss_scale(module.trainer)
    for name, term in module.terms.items():
        term.restore_pending(pending.get(f"terms.{name}", {}))
    for name, layer in module.one_bit_layers.items():
        layer.restore_pending(pending.get(f"layers.{name}", {}))


def _loss_scale(trainer: Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
