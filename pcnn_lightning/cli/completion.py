"""``--print_completion SHELL``: shtab's script, with which a shell completes subcommands, flags and their values."""

import argparse
import re
import sys
from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentParser

from pcnn_lightning.cli.names import class_names, packaged_configs

COMPLETED_AS = {
    **dict.fromkeys(("run_dir", "runs", "out"), "directory"),
    **dict.fromkeys(("file", "output", "ckpt_path", "published"), "file"),
}
"""What shtab completes arguments with whose type is just a string."""


class PrintCompletion(argparse.Action):
    """Prints the script and exits."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        kwargs = {**kwargs, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        super().__init__(option_strings, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        assert isinstance(parser, ArgumentParser)
        script = parser.get_completion_script(f"shtab-{values}")
        names = "|".join(class_names("model") + class_names("data"))
        print(re.sub(rf"\bpcnn_lightning\.({names})\b", r"\1", script))  # by the names that people type
        sys.exit(0)


def add_completion(parser: ArgumentParser, subcommands: Iterable[ArgumentParser]) -> None:
    """Add ``--print_completion``, and say how values are completed where their types do not."""
    parser.add_argument(
        "--print_completion",
        action=PrintCompletion,
        choices=("bash", "zsh"),
        help="Print a script for the shell and exit.",
    )
    for completed in (parser, *subcommands):
        _complete_values(completed)


def _complete_values(parser: ArgumentParser) -> None:
    flags = parser._option_string_actions
    for action in parser._actions:
        if action.dest in COMPLETED_AS:
            action.complete = COMPLETED_AS[action.dest]  # type: ignore[attr-defined]
        elif action.dest.startswith("trainer.") and f"--{action.dest}.help" in flags:
            # This takes a class, whose arguments jsonargparse would complete as well. Those of strategies and plugins
            # reach deep into torch: the script would have 200 MB.
            action.complete = {}  # type: ignore[attr-defined]
    if "--config" in flags:
        names = " ".join(packaged_configs())
        both = f'compgen -f -- "$1"; compgen -W "{names}" -- "$1"'  # files, and the configurations of this package
        flags["--config"].complete = {  # type: ignore[attr-defined]
            "bash": "_pcnn_lightning_config_files",
            "zsh": f"{{_files; compadd {names}}}",
            "preamble": {"bash": f"_pcnn_lightning_config_files() {{ {both}; }}"},
        }
