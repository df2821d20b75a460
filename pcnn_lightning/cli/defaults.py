"""What every run has unless its configuration or a flag changes it: a folder, logs, checkpoints and recorders."""

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from pcnn_lightning.callbacks import (
    Diversity,
    EpochLines,
    FilterCurves,
    FlipRatio,
    GradientNorms,
    KernelHistograms,
    LossCurves,
    StageCheckpoint,
    StageProgressBar,
    StageSwitch,
)
from pcnn_lightning.loggers import StageLogger

OPTIONAL: dict[str, type[Callback]] = {"stage_switch": StageSwitch}
"""Callbacks that a run has only if its configuration says so."""

DEFAULTS: dict[str, type[Callback]] = {
    "epoch_lines": EpochLines,
    "loss_curves": LossCurves,
    "kernel_histograms": KernelHistograms,
    "flip_ratio": FlipRatio,
    "filter_curves": FilterCurves,
    "diversity": Diversity,
    "gradient_norms": GradientNorms,
    "checkpoint": StageCheckpoint,
}
"""Callbacks that every run has, by the argument that changes them; ``null`` turns one off."""


def add_run_arguments(parser: LightningArgumentParser) -> None:
    """Add the folder of the run and its callbacks to a subcommand."""
    parser.add_argument(
        "--run_dir", type=str, default="runs/default", help="Folder of runs; each has its own version_N in it."
    )
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
    run_dir = run["run_dir"]
    callbacks = _listed(arguments["callbacks"])
    for name, callback in {**OPTIONAL, **DEFAULTS}.items():
        wanted = run[name] is not None and not any(isinstance(one, callback) for one in callbacks)
        if wanted and (name != "checkpoint" or arguments["enable_checkpointing"] is not False):
            callbacks.append(run[name])
    if arguments["enable_progress_bar"] is not False and not any(isinstance(one, ProgressBar) for one in callbacks):
        callbacks.append(StageProgressBar())
    if run["checkpoint"] is None and not any(isinstance(one, Checkpoint) for one in callbacks):
        arguments["enable_checkpointing"] = False  # otherwise Lightning adds a checkpoint callback of its own
    if arguments["logger"] in (None, True):
        arguments["logger"] = StageLogger(run_dir)
    logger = _listed(arguments["logger"])
    if arguments["default_root_dir"] is None:
        arguments["default_root_dir"] = run_dir
    # In place of Lightning's summary, which does not know 1-bit layers, there is OneBitCLI.before_fit.
    return {**arguments, "callbacks": callbacks, "logger": logger, "enable_model_summary": False}


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list) else [given] if given else []
