"""The entry point: what the process prints, and what it exits with."""

import io
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pcnn_lightning.cli.interruption import Interruption
from pcnn_lightning.cli.names import PROGRAM, class_names, packaged_configs
from pcnn_lightning.cli.parser import OneBitCLI, Parser, SaveConfig
from pcnn_lightning.cli.subcommands import OneBitTrainer
from pcnn_lightning.cli.sweep.command import sweep
from pcnn_lightning.errors import DivergedError, InputError
from pcnn_lightning.modules import OneBitClassifier
from pcnn_lightning.version import __version__

IGNORED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",  # lightning 2.6 with newer torch
    r".*does not have many workers",  # images in memory need none
    r".*smaller than the logging interval",  # metrics are logged once an epoch
    r".*callbacks used to create the checkpoint",  # testing needs no training callbacks
    r"Using ModelCheckpoint with manual optimization",  # a trap that depends on attribute names we do not use
    r"It is recommended to use .self\.log\('(lr/|stage)",  # the same on all processes
)
"""Warnings that a user cannot or need not act on."""


DESCRIPTION = (
    "Train 1-bit convolutional networks. To begin: fit --config digits.yaml. "
    f"Models: {', '.join(class_names('model'))}. Data: {', '.join(class_names('data'))}. "
    f"Configurations: {', '.join(packaged_configs())}."
)


def main(args: ArgsType = None) -> OneBitCLI:
    """Run the command line. Mistakes of the user end in one line and exit status 2, a diverged run in status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack η, and a name may not be UTF-8
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as with python -m, for classes in files of the user
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # Lightning advertises other products in the log of every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
    with Interruption() as interruption:
        try:
            cli = build(args)
            if cli.subcommand == "sweep":
                sweep(cli.config["sweep"], cli.fit_arguments, build)
            return cli
        except BaseException as error:
            status = _report(error, interruption)
            if advice := getattr(error, "how_to_go_on", None):
                print(advice, file=sys.stderr)
            if status is None:
                raise
            sys.exit(status)


def build(args: ArgsType, cli: type[OneBitCLI] = OneBitCLI, parser: type[Parser] = Parser) -> OneBitCLI:
    """Run a command line with the classes of this package."""
    strict = {"allow_abbrev": False}
    return cli(
        OneBitClassifier,
        LightningDataModule,
        trainer_class=OneBitTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_class=parser,
        parser_kwargs={
            **strict,
            "prog": PROGRAM,
            "usage": f"{PROGRAM} [options]",
            "version": __version__,
            "description": DESCRIPTION,
            **{name: {**strict, **_usage(name)} for name in OneBitCLI.subcommands()},
        },
        args=args,
    )


def _report(error: BaseException, interruption: Interruption) -> int | None:
    """Print an error in one line and return the exit status; None if the error is to be raised again."""
    if isinstance(error, KeyboardInterrupt):  # while nothing is being trained
        return 128 + signal.SIGINT
    if isinstance(error, SIGTERMException):
        return interruption.status  # Lightning's own status would mean success
    if "PCNN_LIGHTNING_TRACEBACK" in os.environ:
        return None
    if isinstance(error, (InputError, DivergedError, MisconfigurationException)):
        # A data loader's worker sends its traceback along; the message follows the name of the error.
        message = str(error).rstrip().rsplit("InputError: ", 1)[-1]
    elif isinstance(error, OSError) and error.strerror is not None:
        message = f"{error.strerror}: {error.filename or 'while writing a file of the run'}"
    elif isinstance(error, (ValueError, KeyError, RuntimeError, TypeError, ZeroDivisionError)):
        if not _is_of_lightning(error):
            return None
        message = f"{' '.join(str(error).split())} ({type(error).__name__})"
    else:
        return None
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return 1 if isinstance(error, DivergedError) else 2


def _usage(subcommand: str) -> dict[str, str]:
    """Instead of a list of all flags, which follow with their meaning."""
    given = {"compare": "RUN [RUN ...]", "sweep": "[FILE] [--config FILE] [--grid KEY=VALUE,VALUE...]"}
    return {"usage": f"{PROGRAM} {subcommand} {given.get(subcommand, '[--config FILE]')} [options]"}


def _is_of_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised this error, which is then about its arguments."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(lightning.__file__).parent in Path(frames[-1].filename).parents
