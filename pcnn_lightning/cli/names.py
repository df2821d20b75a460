"""Names that stand for more on the command line: of models and data, and of the configurations that come along."""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pcnn_lightning import data
from pcnn_lightning.families import FAMILIES


def class_names(argument: str) -> list[str]:
    """The classes that ``model`` or ``data`` knows by their short names."""
    if argument == "model":
        return [family.module.rpartition(".")[2] for family in FAMILIES.values()]
    return [name for name in data.__all__ if name != "ImageDataModule"]


def list_classes(args: Sequence[str]) -> None:
    """Answer ``--model.help`` and ``--data.help`` without a class, whose arguments could be shown, and exit."""
    for word, following in pairwise([*args, "-"]):
        argument = word.removeprefix("--").removesuffix(".help")
        if argument in ("model", "data") and word == f"--{argument}.help" and following.startswith("-"):
            names = class_names(argument)
            print(f"--{argument}.help {names[0]} shows the arguments of a class: {', '.join(names)}")
            sys.exit(0)


def with_packaged_configs(args: Sequence[str]) -> list[str]:
    """Replace the names of this package's configurations, such as ``digits.yaml``, by their paths."""
    found = list(args)
    for index, (word, before) in enumerate(zip(args, ["", *args], strict=False)):
        if before in ("-c", "--config"):
            found[index] = _packaged(word)
        elif word.startswith("--config="):
            found[index] = f"--config={_packaged(word.removeprefix('--config='))}"
    return found


def config_names() -> list[str]:
    """The names of this package's configurations."""
    return sorted(path.name for folder in _CONFIGS for path in folder.glob("*.yaml"))


def _packaged(name: str) -> str:
    path = Path(name)
    if path.parent not in (Path(), Path("configs")) or path.suffix != ".yaml" or path.exists():
        return name
    return next((str(folder / path.name) for folder in _CONFIGS if (folder / path.name).is_file()), name)


_PACKAGE = Path(__file__).parents[1]
_CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""An installed package has its configurations inside; in a checkout, they lie beside it."""
