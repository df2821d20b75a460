"""What a checkpoint holds of a run beside weights and optimizer, so that the run can go on bit for bit."""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from pcnn_lightning.checkpoints import check_same_tensors
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import SignActivation
from pcnn_lightning.modules.metrics import EpochMeans
from pcnn_lightning.stages import ENTERING, Stage, StagedModule

Pending = dict[str, dict[str, Tensor]]
"""State of an unfinished update: gradients, and the state of each term and of each layer."""


class ResumableModule(StagedModule, Protocol):
    """A module whose runs can be resumed within an update."""

    family: str
    train_means: EpochMeans
    entered: int

    @property
    def sign_activations(self) -> Sequence[SignActivation]: ...

    @property
    def trainer(self) -> Trainer: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Tensor]: ...


def save_run(module: ResumableModule) -> dict[str, Any]:
    """The record of a run, which checkpoints hold as ``one_bit``."""
    trainer = module.trainer
    folders = [getattr(trainer, "run_folder", None), *(getattr(logger, "log_dir", None) for logger in trainer.loggers)]
    return {
        "family": module.family,
        "class_path": f"{type(module).__module__}.{type(module).__qualname__}",
        "stage": module.stage,
        "stage_name": module.stage_name.removeprefix(ENTERING),
        "entered": module.entered,
        "overrides": {name: one for name, one in module.settings.items() if one != module.hparams.get(name)},
        "stage_start": module.stage_start,
        "layer_stages": [layer.stage for layer in module.one_bit_layers.values()],
        "sign_activations": [activation.enabled for activation in module.sign_activations],
        "plan": list(module.plan),
        "optimizer": module.settings["optimizer"],
        "train_means": module.train_means.sums(trainer.strategy),
        "log_dirs": [str(Path(folder).resolve()) for folder in folders if folder],
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def restored_stage(saved: dict[str, Any], plan: Mapping[str, Stage]) -> Stage | None:
    """The stage of a record: that of the ``plan``, if there is one of its name. None of a full-precision network."""
    kind = saved["stage"]
    return None if kind == "full_precision" else plan.get(saved["stage_name"]) or Stage(kind)


def check_run(module: ResumableModule, checkpoint: dict[str, Any], fitting: bool) -> None:
    """Check that a model can go on from a checkpoint.

    Raises:
        InputError: names what differs.
    """
    saved = checkpoint.get("one_bit", {})
    if saved.get("family") != module.family:
        held = saved.get("family", "model that pcnn_lightning did not train")
        raise InputError(f"the checkpoint holds a {held}, not a {module.family}")
    if not fitting:
        # Only the network is needed; terms of the loss that only one of the two has do not matter.
        own, found = module.state_dict(), checkpoint["state_dict"]
        networks = ({name: one for name, one in state.items() if name.startswith("net.")} for state in (own, found))
        check_same_tensors(*networks)
        same = {name for name, one in own.items() if name in found and found[name].shape == one.shape}
        checkpoint["state_dict"] = {name: found[name] if name in same else one for name, one in own.items()}
        return
    check_same_tensors(module.state_dict(), checkpoint["state_dict"])
    if "optimizer_states" not in checkpoint or "loops" not in checkpoint:
        raise InputError(
            "the checkpoint has weights only, without the optimizer's state, and training cannot go on from it: "
            "start a new run with init_from"
        )
    before, now = checkpoint["hyper_parameters"].get("accumulate"), module.hparams["accumulate"]
    if _is_within_epoch(checkpoint) and before != now:
        raise InputError(f"the checkpoint is within an epoch: accumulate must be {before}, but got {now}")
    planned, name = saved.get("plan", []), saved.get("stage_name")
    if module.plan and name not in module.plan:
        raise InputError(
            f"the checkpoint is in stage {name}, but the stages of this run are {', '.join(module.plan)}: "
            "give it the plan of its run again, or start a new run with init_from"
        )
    if not module.plan and (name in planned[:-1] or saved.get("overrides")):
        raise InputError(
            f"the checkpoint is of a run that goes through the stages {', '.join(planned)}: give it its stage_switch "
            "or stage_plan again, or start a new run with init_from"
        )
    stage = restored_stage(saved, module.plan)
    wanted = {**module.hparams, **({} if stage is None else stage.overrides)}["optimizer"]
    if (optimizer := saved.get("optimizer")) != wanted:
        raise InputError(
            f"the checkpoint has the state of optimizer {optimizer}, which {wanted} cannot go on from: "
            "name the same one, or start a new run with init_from"
        )
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    if "current_model_state" in checkpoint and not any(isinstance(one, WeightAveraging) for one in callbacks):
        raise InputError(
            "the checkpoint is of a run with averaged weights: give trainer.callbacks its WeightAveraging again, "
            "or start a new run with init_from"
        )


def _is_within_epoch(checkpoint: dict[str, Any]) -> bool:
    progress = checkpoint["loops"]["fit_loop"]
    epochs = progress["epoch_progress"]["current"]
    return bool(epochs["started"] > epochs["processed"]) and not progress["epoch_loop.batch_progress"]["is_last_batch"]


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


def leave_finished_epoch(trainer: Trainer) -> None:
    """Go on with the next epoch if the checkpoint is of an epoch's end.

    Lightning does so by itself, but not if ``max_steps`` is set: it would end that epoch for a second time.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        loop.epoch_loop.restarting = loop._restarting = False


def random_state(trainer: Trainer) -> list[dict[str, Any]]:
    """States of the global random number generators of each process."""
    device = trainer.strategy.root_device
    own: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = numpy_state
    own["numpy"] = (kind, torch.from_numpy(keys.astype(np.int64)), *rest)
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    if trainer.world_size == 1:
        return [own]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, own)
    return gathered


def restore_random_state(states: list[dict[str, Any]], trainer: Trainer) -> None:
    """Restore :func:`random_state`; with another number of processes, there is nothing to restore."""
    if len(states) != trainer.world_size:
        return
    own, device = states[trainer.global_rank], trainer.strategy.root_device
    torch.set_rng_state(own["torch"].cpu())
    random.setstate(own["python"])
    kind, keys, *rest = own["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"].cpu(), device)


def _loss_scale(trainer: Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
