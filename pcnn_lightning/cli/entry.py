"""The entry point: what the process prints, and what it exits with."""

import io
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pcnn_lightning.cli.interruption import Interruption
from pcnn_lightning.cli.parser import OneBitCLI, Parser, SaveConfig
from pcnn_lightning.cli.subcommands import OneBitTrainer
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
    r"Checkpoint directory .* exists and is not empty",  # files of other runs are not overwritten
)
"""Warnings that a user cannot or need not act on."""


def main(args: ArgsType = None) -> OneBitCLI:
    """Run the command line. Mistakes of the user end in one line and exit status 2, a diverged run in status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack η, and a name may not be UTF-8
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # Lightning advertises other products in the log of every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
    strict = {"allow_abbrev": False}
    with Interruption() as interruption:
        try:
            return OneBitCLI(
                OneBitClassifier,
                LightningDataModule,
                trainer_class=OneBitTrainer,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                parser_kwargs={
                    **strict,
                    "prog": "pcnn_lightning",
                    "version": __version__,
                    "description": "Train 1-bit convolutional networks.",
                    **dict.fromkeys(OneBitCLI.subcommands(), strict),
                },
                args=args,
            )
        except (InputError, DivergedError, MisconfigurationException) as error:
            if "PCNN_LIGHTNING_TRACEBACK" in os.environ:
                raise
            # A data loader's worker sends its traceback along; the message follows the name of the error.
            message = str(error).rstrip().rsplit("InputError: ", 1)[-1]
            _fail(message, 1 if isinstance(error, DivergedError) else 2)
        except (ValueError, KeyError, RuntimeError, TypeError, ZeroDivisionError) as error:
            if "PCNN_LIGHTNING_TRACEBACK" in os.environ or not _is_of_lightning(error):
                raise
            _fail(f"{' '.join(str(error).split())} ({type(error).__name__})", 2)
        except OSError as error:
            if "PCNN_LIGHTNING_TRACEBACK" in os.environ or error.strerror is None:
                raise
            _fail(f"{error.strerror}: {error.filename or 'while writing a file of the run'}", 2)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)  # while nothing is being trained
        except SIGTERMException:
            sys.exit(interruption.status)  # Lightning's own status would mean success


def _is_of_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised this error, which is then about its arguments."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(lightning.__file__).parent in Path(frames[-1].filename).parents


def _fail(message: str, status: int) -> NoReturn:
    print(f"pcnn_lightning: error: {message}", file=sys.stderr)
    sys.exit(status)
