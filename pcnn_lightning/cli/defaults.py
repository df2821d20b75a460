"""What every run has unless its configuration or a flag changes it: a folder, logs, checkpoints and recorders."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from pcnn_lightning.callbacks import (
    ConfusionMatrix,
    Diversity,
    EpochLines,
    FilterCurves,
    FlipRatio,
    GradientNorms,
    KernelHistograms,
    LossCurves,
    StageCheckpoint,
    StagePlan,
    StageProgressBar,
    StageSwitch,
)
from pcnn_lightning.cli.run_folder import CHECKPOINTS
from pcnn_lightning.errors import InputError
from pcnn_lightning.loggers import StageLogger

OPTIONAL: dict[str, type[Callback]] = {"stage_switch": StageSwitch, "stage_plan": StagePlan}
"""Callbacks that a run has only if its configuration says so."""

DEFAULTS: dict[str, type[Callback]] = {
    "epoch_lines": EpochLines,
    "loss_curves": LossCurves,
    "kernel_histograms": KernelHistograms,
    "flip_ratio": FlipRatio,
    "filter_curves": FilterCurves,
    "diversity": Diversity,
    "gradient_norms": GradientNorms,
    "confusion_matrix": ConfusionMatrix,
    "checkpoint": StageCheckpoint,
}
"""Callbacks that every run has, by the argument that changes them; ``null`` turns one off."""


def add_run_arguments(parser: LightningArgumentParser) -> None:
    """Add the folder of the run and its callbacks to a subcommand."""
    about = "Folder of runs, each with its own version_N in it; or one of these, to name a run."
    parser.add_argument("--run_dir", type=str, default="runs/default", help=about)
    for name, callback in {**OPTIONAL, **DEFAULTS}.items():
        default = None if name in OPTIONAL else {"class_path": f"pcnn_lightning.{callback.__name__}"}
        parser.add_argument(
            f"--{name}", type=callback | None, default=default, help=f"Arguments of {callback.__name__}, or null."
        )


def trainer_arguments(run: Namespace) -> dict[str, Any]:
    """The Trainer's arguments with the defaults of a run filled in, in lists where there may be several.

    Args:
        run: the instantiated configuration of a subcommand.
    """
    arguments = dict(run["trainer"])
    if arguments["barebones"]:  # only the loop
        return arguments
    callbacks = _listed(arguments["callbacks"])
    if run["stage_switch"] is not None and run["stage_plan"] is not None:
        raise InputError("stage_switch and stage_plan are two plans of one run: set one of them to null")
    for name, callback in {**OPTIONAL, **DEFAULTS}.items():
        given = any(type(one) is callback if name in OPTIONAL else isinstance(one, callback) for one in callbacks)
        wanted = run[name] is not None and not given
        if wanted and (name != "checkpoint" or arguments["enable_checkpointing"] is not False):
            callbacks.append(run[name])
    if arguments["enable_progress_bar"] is not False and not any(isinstance(one, ProgressBar) for one in callbacks):
        callbacks.append(StageProgressBar())
    if run["checkpoint"] is None and not any(isinstance(one, Checkpoint) for one in callbacks):
        arguments["enable_checkpointing"] = False  # otherwise Lightning adds a checkpoint callback of its own
    logger: bool | list[Any] = True if arguments["logger"] in (None, True) else _listed(arguments["logger"])
    # In place of Lightning's summary, which does not know 1-bit layers, there is OneBitCLI.before_fit.
    return {**arguments, "callbacks": callbacks, "logger": logger, "enable_model_summary": False}


def use_folder(arguments: dict[str, Any], folder: Path | None) -> None:
    """Let a Trainer's loggers and checkpoints use the folder of the run, unless they have a place of their own.

    Args:
        arguments: of :func:`trainer_arguments`; they are changed.
        folder: the folder; None for none, and then no logs by default.
    """
    for callback in arguments["callbacks"]:
        if folder is not None and isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder / CHECKPOINTS)
    if arguments["logger"] is True:
        arguments["logger"] = _listed(folder and StageLogger(folder.parent))
    if arguments["default_root_dir"] is None and folder is not None:
        arguments["default_root_dir"] = str(folder)


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list) else [given] if given else []
