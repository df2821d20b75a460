"""The command ``sweep``: checks all runs before the first one begins, and runs or prints those that remain."""

import logging
import shlex
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from pcnn_lightning.callbacks import LossCurves, StageCheckpoint, StagePlan
from pcnn_lightning.cli.names import packaged_sweeps
from pcnn_lightning.cli.parser import OneBitCLI, Parser
from pcnn_lightning.cli.run_folder import CONFIG, requeued_checkpoint
from pcnn_lightning.cli.sweep.folder import SweepFolder, can_go_on, clear, finish, locked, results_of
from pcnn_lightning.cli.sweep.local import end_with_parent, run_all
from pcnn_lightning.cli.sweep.plan import Axis, Plan, Run, check_distinct, parse_axis, read_plan, select
from pcnn_lightning.cli.sweep.slurm import SCRIPT, array_job
from pcnn_lightning.errors import InputError, one_line
from pcnn_lightning.files import write_whole

Build = Callable[[list[str], type[OneBitCLI], type[Parser]], OneBitCLI]
"""Runs a command line with these classes of CLI and parser."""


def sweep(options: Namespace, arguments: Sequence[str], build: Build) -> None:
    """Run the sweep that ``options`` and arguments of ``fit`` describe, or one of its runs.

    Raises:
        InputError: if there is a mistake in the sweep or in any of its runs; nothing has begun then.
        SystemExit: with status 1, if runs failed.
    """
    if options["run_dir"] is not None:
        others = [name for name in ("file", "grid", "out", "slurm", "print") if options[name]]
        if others or arguments:
            raise InputError(f"run_dir cannot be combined with {[*others, *arguments][0]}")
        run_one(Path(options["run_dir"]), build)
        return
    if options["jobs"] < 1:
        raise InputError(f"jobs must be at least 1, but got {options['jobs']}")
    if options["print"] and options["slurm"] is not None:
        raise InputError("print and slurm exclude each other")
    plan = plan_of(options, arguments)
    if plan.out is None:
        raise InputError("out is missing: the folder of the sweep")
    out, runs = plan.out, plan.runs()
    if sys.stderr.isatty():
        print(f"checking {len(runs)} runs", file=sys.stderr)
    elsewhere = options["print"] or options["slurm"] is not None
    configs = [check_run(run, out / run.name, build, elsewhere) for run in runs]
    check_distinct(runs, [{**yaml.safe_load(config), "run_dir": None} for config in configs])
    folder = SweepFolder(out)
    folder.check(plan, runs, configs)
    with locked(out, f"out: another sweep is at work in {out}: wait for it, or stop it", patience=30) as lock:
        folder.check(plan, runs, configs)  # another one may have written it
        folder.write(plan, runs, configs, [command_of(run, out) for run in runs])
        remaining = [out / run.name for run in runs if results_of(out / run.name) is None]
        if options["print"]:
            print("".join(f"{shlex.join([*PYTHON, 'sweep', '--run_dir', str(run)])}\n" for run in remaining), end="")
        elif not remaining:
            print(f"all {len(runs)} runs have finished")
        elif options["slurm"] is not None:
            write_whole(out / SCRIPT, array_job(remaining, out, options["slurm"]).encode())
            print(f"sbatch {shlex.quote(str(out / SCRIPT))}")
        else:
            print(f"{len(remaining)} of {len(runs)} runs to do, {options['jobs']} at a time", flush=True)
            failed = run_all(remaining, options["jobs"], lock)
            print(f"To compare: {shlex.join([*PYTHON, 'compare', str(out)])}")
            if failed:
                sys.exit(1)


PYTHON = ["python", "-m", "pcnn_lightning"]
"""Start of the commands that are shown to the user."""


def plan_of(options: Namespace, arguments: Sequence[str]) -> Plan:
    """The plan of a file, if there is one, with what the command line adds or changes.

    Raises:
        InputError: if there is a mistake in it.
    """
    file = options["file"]
    plan = Plan() if file is None else read_plan(packaged_sweeps().get(file, Path(file)))
    given: dict[str, Axis] = {}
    for text in options["grid"] or []:
        for key, axis in parse_axis(text).items():
            if key in given:
                raise InputError(f"--grid {key} is given twice: name all of its values at once")
            given[key] = select(plan.grid[key], axis, key) if key in plan.grid else axis
    out = plan.out if options["out"] is None else Path(options["out"]).expanduser()
    return Plan(out, [*plan.shared, *arguments], plan.grid | given)


def command_of(run: Run, out: Path) -> str:
    """The command that trains a run alone."""
    return shlex.join([*PYTHON, "fit", *run.args, "--run_dir", str(out / run.name)])


class _RaisingParser(Parser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "exit_on_error": False})


class _Check(OneBitCLI):
    """Parses and instantiates as ``fit`` does, and stops there."""

    def _find_run(self, run: Namespace, arguments: dict[str, Any]) -> None:
        """Without a folder."""

    def _run_subcommand(self, subcommand: str) -> None:
        trainer: Any = self.trainer
        if trainer.fast_dev_run or trainer.barebones:
            raise InputError("fast_dev_run and barebones leave no files, from which a sweep could go on")
        keeping = [one for one in trainer.callbacks if isinstance(one, StageCheckpoint)]
        if not keeping or any(one.dirpath is not None or not one.save_last or one.save_weights_only for one in keeping):
            raise InputError(
                "a sweep needs checkpoint, with save_last and without dirpath and save_weights_only: a run goes on "
                "from the last checkpoint in its folder"
            )
        for one in trainer.callbacks:
            if isinstance(one, StagePlan) and one.concerns(self.model):
                one.check(self.model, trainer)
                one.begin_run(self.model)
        if not any(isinstance(one, LossCurves) for one in trainer.callbacks):
            raise InputError("a sweep needs loss_curves, which record its results")
        run = self.config["fit"]
        if run["ckpt_path"] is not None:
            raise InputError(f"ckpt_path: a sweep begins its runs anew, but got {run['ckpt_path']}: see init_from")
        if run["trainer"]["default_root_dir"] is not None:
            raise InputError("trainer.default_root_dir: the runs of a sweep have folders of their own: leave it out")
        if trainer.limit_test_batches == 0:
            raise InputError("trainer.limit_test_batches is 0, but a sweep tests its runs")


class _CheckElsewhere(_Check):
    """Without the devices of the machine on which the runs will be."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return super().instantiate_trainer(accelerator="cpu", devices=1, num_nodes=1, strategy="auto", **kwargs)


def check_run(run: Run, folder: Path, build: Build, elsewhere: bool = False) -> str:
    """Instantiate a run, and return its complete configuration in YAML.

    Args:
        run: the run.
        folder: its folder.
        build: runs a command line.
        elsewhere: whether it will run on another machine.

    Raises:
        InputError: names the run and the mistake in it.
    """
    logs = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli = build(
                ["fit", *run.args, "--run_dir", str(folder)], _CheckElsewhere if elsewhere else _Check, _RaisingParser
            )
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise InputError(f"{run.name}: {one_line(error)}") from error
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
    text: str = cli._subcommand_parsers["fit"].dump(cli.config["fit"], skip_none=False)
    return text


def run_one(folder: Path, build: Build) -> None:
    """Train a run of a sweep, from its last checkpoint if it has one, and test its best one.

    Raises:
        InputError: if ``folder`` is none of a sweep.
    """
    config = folder / CONFIG
    if not config.is_file():
        raise InputError(f"run_dir: {folder} is not the folder of a run of a sweep, which has a {CONFIG}")
    if results_of(folder) is not None:
        print(f"{folder} has finished")
        return
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    with locked(folder, f"run_dir: {folder} is running already") if is_first else nullcontext():
        end_with_parent()
        # That of a requeued job of SLURM, which fit finds itself, may be newer than the last.
        requeued = requeued_checkpoint(folder) if SLURMEnvironment.detect() else None
        if is_first:
            clear(folder)
        arguments = ["--config", str(config), "--run_dir", str(folder)]
        go_on = ["--ckpt_path", "last"] if requeued is None and can_go_on(folder) else []
        build(["fit", *arguments, *go_on], OneBitCLI, Parser)
        build(["test", *arguments, "--ckpt_path", "best"], OneBitCLI, Parser)
        if is_first:
            finish(folder)
