"""One optimizer with a group of parameters for each learning rate, so that steps are counted and scaled once."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer

from pcnn_lightning.checks import check_number
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules.schedules import LearningRate
from pcnn_lightning.stages import StagedModule

KERNELS, OTHERS, SECOND = "kernels", "others", "second"
"""Kinds of groups: the latent kernels and everything else learned at η₁, and the second parameters, learned at η₂."""


class GroupSettings(NamedTuple):
    """How a group of parameters is learned: its learning rate over a stage, and its weight decay."""

    rate: LearningRate
    weight_decay: float


def group_settings(
    name: str, base: float, shape: Mapping[str, Any], weight_decay: float, prefix: str = ""
) -> GroupSettings:
    """Check the settings of a group.

    Args:
        name: name of the learning rate, ``eta1`` or ``eta2``.
        base: the highest learning rate.
        shape: ``schedule``, ``milestones``, ``decay`` and ``warmup_epochs``, as for :class:`LearningRate`.
        weight_decay: weight decay of the parameters.
        prefix: prefix of the other arguments' names, for error messages.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """
    check_number(f"{prefix}weight_decay", weight_decay, 0)
    try:
        options = {field: shape[field] for field in ("schedule", "decay", "warmup_epochs")}
        return GroupSettings(LearningRate(base, milestones=tuple(shape["milestones"]), **options), weight_decay)
    except ValueError as error:
        field = "" if "learning rate" in str(error) else prefix
        raise ValueError(f"{name}: {field}{error}") from None


def settings_of(group: str, settings: Mapping[str, GroupSettings]) -> GroupSettings:
    """The settings of a group, by its name in the logs: that of second parameters is their own, such as projections.

    Raises:
        ValueError: if it has none.
    """
    kind = group if group in (KERNELS, OTHERS) else SECOND
    if kind not in settings:
        raise ValueError(f"{group} have no learning rate: derive from TwoRateClassifier")
    return settings[kind]


def group_options(group: str, settings: Mapping[str, GroupSettings], hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group of the optimizer, apart from its learning rate, which every update sets."""
    options: dict[str, Any] = {"weight_decay": settings_of(group, settings).weight_decay}
    if hparams["optimizer"] == "sgd":
        momentum = hparams["momentum"]
        options |= {"momentum": momentum, "nesterov": hparams["nesterov"] and momentum > 0}
    return options


def make_optimizer(
    parameters: Mapping[str, list[nn.Parameter]], settings: Mapping[str, GroupSettings], hparams: Mapping[str, Any]
) -> Optimizer:
    """An optimizer of named groups of parameters.

    Args:
        parameters: the parameters of each group, by its name in the logs.
        settings: learning rates and weight decay by kind of group.
        hparams: ``optimizer``, ``momentum`` and ``nesterov``.

    Raises:
        ValueError: if a group has no learning rate.
    """
    groups = [
        {"params": members, "name": name, "lr": settings_of(name, settings).rate.base}
        | group_options(name, settings, hparams)
        for name, members in parameters.items()
    ]
    return (torch.optim.SGD if hparams["optimizer"] == "sgd" else torch.optim.Adam)(groups)


def begin_optimization(
    optimizer: Optimizer, settings: Mapping[str, GroupSettings], module: StagedModule, trainer: Trainer
) -> None:
    """Check the length of the run, and give a resumed optimizer the settings of this run in place of its saved ones.

    Raises:
        InputError: if a schedule needs the length of a run that has no end.
    """
    endless = math.isinf(run_epochs(module, trainer))  # whatever the stage: another one may follow
    if endless and any(one.rate.schedule in ("multistep", "cosine") for one in settings.values()):
        raise InputError(
            "trainer.max_epochs or trainer.max_steps must be set: a multistep or cosine schedule is laid over "
            "the length of a stage"
        )
    for group in optimizer.param_groups:
        group.update(group_options(group["name"], settings, module.settings))


def set_rates(
    optimizer: Optimizer, settings: Mapping[str, GroupSettings], module: StagedModule, trainer: Trainer, update: int
) -> None:
    """Set the learning rates for an update of the current epoch."""
    updates = updates_per_epoch(module, trainer)
    epoch = trainer.current_epoch - module.stage_start + update / updates
    step = 1.0 if math.isinf(updates) else 1 / updates  # of unknown length, an epoch has one rate
    for group in optimizer.param_groups:
        group["lr"] = settings_of(group["name"], settings).rate.at(epoch, stage_epochs(module, trainer), step)


def stage_epochs(module: StagedModule, trainer: Trainer) -> float:
    """Length of the current stage in epochs; infinite if the run has no end."""
    end = run_epochs(module, trainer)
    return (end if module.stage_end is None else min(end, module.stage_end)) - module.stage_start


def run_epochs(module: StagedModule, trainer: Trainer) -> float:
    """Length of the run in epochs, by ``max_epochs`` and ``max_steps``; infinite if it has no end."""
    end, max_steps = trainer.max_epochs, trainer.max_steps
    length = math.inf if end is None or end < 0 else float(end)
    if max_steps >= 0 and not math.isinf(updates_per_epoch(module, trainer)):
        length = min(length, max_steps / updates_per_epoch(module, trainer))
    return length


def updates_per_epoch(module: StagedModule, trainer: Trainer) -> float:
    """Number of optimizer steps per epoch; infinite if the data have no length."""
    batches, accumulate = trainer.num_training_batches, module.hparams["accumulate"]
    return math.inf if math.isinf(batches) else math.ceil(batches / accumulate)
