"""Names that stand for more on the command line, and mistakes told by them.

These are the names of models and data, and of the configurations of this package.
"""

import os
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pcnn_lightning import data
from pcnn_lightning.families import FAMILIES

PROGRAM = "pcnn_lightning"
"""The installed command, which is the same as ``python -m pcnn_lightning``."""


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


def packaged_configs() -> dict[str, Path]:
    """The configurations of this package, by their names."""
    package = Path(__file__).parents[1]
    # In a checkout, they lie beside the package; an installed one has them inside.
    folder = next((one for one in (package / "configs", package.parent / "configs") if one.is_dir()), package)
    return {path.name: path for path in sorted(folder.glob("*.yaml"))}


def packaged_sweeps() -> dict[str, Path]:
    """The sweeps of this package, by their names."""
    configs = next(iter(packaged_configs().values())).parent
    return {path.name: path for path in sorted(configs.glob("sweeps/*.yaml")) if not Path(path.name).exists()}


def _packaged(name: str) -> str:
    path = Path(name)
    if path.parent not in (Path(), Path("configs")) or path.exists():
        return name
    return str(packaged_configs().get(path.name, name))


def readable(message: str) -> str:
    """The parser's message about a mistake, in one line that names what is allowed."""
    names = {argument: f"one of {', '.join(class_names(argument))}" for argument in ("model", "data")}
    if missing := re.search(r"arguments are required: (.+)", message):
        wanted = [f"--{name} ({names[name]})" for name in ("model", "data") if f".{name}" in missing[1]]
        if wanted:
            return f"{' and '.join(wanted)} must be given, or a configuration that has it, such as --config digits.yaml"
    if wrong := re.search(r'Parser key "(model|data)".*Expected a dot import path string: (\S+)', message, re.DOTALL):
        return f"{wrong[1]} must be {names[wrong[1]]}, or the import path of a class, but got {wrong[2]}"
    if missing := re.search(r'Parser key "config": File does not exist: \'(.+)\'', message):
        return (
            f"there is no configuration {os.path.relpath(missing[1])}; those of this package need no folder: "
            f"{', '.join(packaged_configs())}"
        )
    if missing := re.search(r'Parser key "([\w.]+)".*Expected a dot import path string: (\S+)', message, re.DOTALL):
        return f"{missing[1]}: no class {missing[2]} fits here"
    # Of the reasons why a value fits none of several types, the class that was named has the one that helps.
    key, reason = (
        re.search(r'Parser key "(.+?)"', message),
        re.search(r"class_path '(.+?)':\s+((?!\s|Option 'class_path').+?)\n\s+- Expected a <class", message, re.DOTALL),
    )
    if key is None:
        return message
    if "Option 'class_path' is not accepted" in message and (given := re.search(r"Given value: (.+)", message)):
        return f"{key[1]} must have its arguments in init_args, but got {given[1]}"
    if reason is None:
        return message if "class_path" in message else _expected(key[1], message) or message
    if inner := re.match(r'Parser key "(.+?)"', reason[2]):
        if within := re.search(r"class_path '(.+?)':\s+(.+)", reason[2], re.DOTALL):  # an object in a list
            return f"{key[1]}.{inner[1]}: {within[1].rpartition('.')[2]}: {' '.join(within[2].split())}"
        return _expected(f"{key[1]}.{inner[1]}", reason[2]) or message
    return f"{key[1]}: {reason[1]}: {' '.join(reason[2].split())}"


def _expected(key: str, message: str) -> str | None:
    """What a value of a plain type must be."""
    types = [_plain(kind) for kind in re.findall(r"Expected an? (.+?)(?:\. Got value|\n|$)", message)]
    value = re.search(r"(?:Got value|Given value): (.+)", message)
    if not types or value is None or any("." in kind for kind in types):
        return None
    return f"{key} must be {' or '.join(dict.fromkeys(types))}, but got {value[1]}"


def _plain(kind: str) -> str:
    if choices := re.fullmatch(r"typing\.Literal\[(.+)\]", kind):
        return f"one of {choices[1].replace(chr(39), '')}"
    named = re.fullmatch(r"<class '(\w+)'>", kind)
    return {"NoneType": "null", "str": "text"}.get(named[1], named[1]) if named else kind.replace("typing.", "")
