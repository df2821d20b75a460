"""The runs of a sweep: all combinations of the values on the axes of a grid."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from pcnn_lightning.cli.names import packaged_sweeps
from pcnn_lightning.errors import InputError, one_line

LONGEST_NAME = 200
"""Upper bound of the bytes in the name of a run, which names its folder."""
MOST_RUNS = 10_000
"""Upper bound of the runs in a sweep."""

KEYS = ("base", "out", "config", "arguments", "grid")
"""Keys of the file of a sweep."""

_REPLACED = re.compile(r"[^\w.+-]+")
"""Characters that are replaced in the names of folders."""

Axis = dict[str, list[str]]
"""The arguments of ``fit`` by the label of a value."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: name of its folder, such as ``projection_loss_weight=0.001,seed_everything=0``.
        values: label of its value by axis, of which the last part is enough if it is the only one of that name.
        args: its arguments for ``fit``.
    """

    name: str
    values: dict[str, str]
    args: list[str]


@dataclass
class Plan:
    """What a sweep consists of.

    Attributes:
        out: folder of the sweep.
        shared: arguments for ``fit`` that all runs have.
        grid: values by axis: an argument of ``fit``, or a name whose values are sets of arguments.
    """

    out: Path | None = None
    shared: list[str] = field(default_factory=list)
    grid: dict[str, Axis] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """Return a run for each combination of values; the last axis changes fastest.

        Raises:
            InputError: if there is no axis, or two runs would share a folder.
        """
        if not self.grid:
            raise InputError("a sweep needs a grid: --grid KEY=VALUE,VALUE... or a sweep file")
        if (count := math.prod(map(len, self.grid.values()))) > MOST_RUNS:
            raise InputError(f"the grid has {count:,} runs, but a sweep may have at most {MOST_RUNS:,}")
        ends = [key.rpartition(".")[2] for key in self.grid]
        names = [end if ends.count(end) == 1 else key for key, end in zip(self.grid, ends, strict=True)]
        found: dict[str, Run] = {}
        for labels in product(*self.grid.values()):
            values = dict(zip(names, labels, strict=True))
            args = [axis[label] for axis, label in zip(self.grid.values(), labels, strict=True)]
            # The configurations of a value are its base: what all runs share comes after them, and settings last.
            bases = [word for words in args for word in words if word.startswith("--config=")]
            settings = [word for words in args for word in words if not word.startswith("--config=")]
            run = Run(_name(values), values, [*bases, *self.shared, *settings])
            if (length := len(run.name.encode())) > LONGEST_NAME:
                raise InputError(
                    f"the folder of the run {run.name[:60]}... would have a name of {length} bytes, but at most "
                    f"{LONGEST_NAME} are allowed: give the values names, as in the files of configs/sweeps"
                )
            if other := found.get(run.name.casefold()):  # some file systems do not tell A from a
                raise InputError(
                    f"two runs would share the folder {run.name}: {_described(other)} and {_described(run)}"
                )
            found[run.name.casefold()] = run
        return list(found.values())


def _name(values: Mapping[str, str]) -> str:
    return ",".join(f"{key}={_REPLACED.sub('_', label).strip('_')}" for key, label in values.items())


def _described(run: Run) -> str:
    return shlex.join(f"{key}={label}" for key, label in run.values.items())


def read_plan(file: Path, path: tuple[Path, ...] = ()) -> Plan:
    """Read the file of a sweep.

    ``grid`` maps each argument of ``fit`` to a list of values, or a name to sets of arguments, each with a name of its
    own; a set may have a ``config`` as well. ``config`` and ``arguments`` are configurations and arguments of all runs,
    ``out`` is the folder, and ``base`` the file of another sweep, which this one changes.

    Args:
        file: the file.
        path: the files whose ``base`` this one is.

    Raises:
        InputError: if the file cannot be read, or has other contents.
    """
    return _plan_of(_read(file, path), file)


def _read(file: Path, path: tuple[Path, ...]) -> dict[str, Any]:
    if file.resolve() in path:
        raise InputError(f"{file} has itself as its base")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"there is no sweep file {file} ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict) or not content.keys() <= {*KEYS}:
        others = ", ".join(str(key) for key in content if key not in KEYS) if isinstance(content, dict) else content
        raise InputError(f"{file} must have the keys {', '.join(KEYS)} only, but got {others}")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise InputError(f"{file}: base must be the file of another sweep, but got {base!r}")
    places = [packaged_sweeps().get(base), file.parent / base, Path(base)]
    found = next((place for place in places if place is not None and place.is_file()), file.parent / base)
    merged: dict[str, Any] = _merged(_read(found, (*path, file.resolve())), content)
    return merged


def _merged(below: Any, above: Any) -> Any:
    """``above`` laid over ``below``, key by key."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _plan_of(content: Mapping[str, Any], file: Path) -> Plan:
    out, grid = content.get("out"), content.get("grid")
    if not isinstance(out, str | None):
        raise InputError(f"{file}: out must be a folder, but got {out!r}")
    if not isinstance(grid, dict):
        raise InputError(f"{file}: grid must map arguments of fit to lists of values, but got {grid!r}")
    axes = {str(key): _axis(str(key), values, str(file)) for key, values in grid.items()}
    shared = {"config": content.get("config"), **_mapping(content.get("arguments") or {}, f"{file}: arguments")}
    return Plan(None if out is None else Path(out).expanduser(), _arguments(shared, str(file)), axes)


def parse_axis(given: str) -> dict[str, Axis]:
    """Parse ``KEY=VALUE,VALUE...``; the values are YAML, so that a list is ``[16,32],[32,64]``.

    Raises:
        InputError: if this is something else.
    """
    key, equals, values = given.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--grid {given}: must be KEY=VALUE,VALUE..., with an argument of fit as the key")
    try:
        # Scalars stay as they were typed, for the parser of fit: YAML would make 8 of 010.
        items = yaml.compose(f"[{values}]", yaml.SafeLoader).value
        parsed = [item.value if isinstance(item, yaml.ScalarNode) else _constructed(item) for item in items]
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise InputError(f"--grid {given}: the values must be separated by commas, and lists be in brackets") from None
    return {key.strip(): _axis(key.strip(), parsed, f"--grid {given}")}


def _constructed(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def _axis(key: str, values: Any, where: str) -> Axis:
    if key == "config" or not re.fullmatch(r"\w[\w.]*", key):
        raise InputError(f"{where}: {key} cannot be an axis: name an axis like an argument of fit, without dashes")
    if isinstance(values, dict) and values:
        return {
            _text(name, where): _arguments(settings, f"{where}: {key}: {name}") for name, settings in values.items()
        }
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: {key} must have one or more values, but got {values!r}")
    texts = [_text(value, f"{where}: {key}") for value in values]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise InputError(f"{where}: two runs would share a folder: {key} has the value {twice} twice")
    return {text: [f"--{key}={text}"] for text in texts}


def select(axis: Axis, chosen: Axis, key: str) -> Axis:
    """The values of an axis that the command line chooses: by their labels, if the axis has sets of arguments.

    Raises:
        InputError: if there is no value of that label.
    """
    if all(args == [f"--{key}={label}"] for label, args in axis.items()):
        return chosen
    if unknown := [label for label in chosen if label not in axis]:
        raise InputError(f"--grid {key}: there is no {unknown[0]}; there are {', '.join(axis)}")
    return {label: axis[label] for label in chosen}


def _mapping(settings: Any, where: str) -> dict[Any, Any]:
    if not isinstance(settings, dict):
        raise InputError(f"{where} must map arguments of fit to values, but got {settings!r}")
    return settings


def _arguments(settings: Any, where: str) -> list[str]:
    settings = _mapping(settings, where)
    configs = _configs(settings.get("config"), where)
    return configs + [
        f"--{key}={_text(value, f'{where}: {key}')}" for key, value in settings.items() if key != "config"
    ]


def _configs(given: Any, where: str) -> list[str]:
    names = given if isinstance(given, list) else [] if given is None else [given]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise InputError(f"{where}: config must be a file or a list of files, but got {wrong[0]!r}")
    return [f"--config={name}" for name in names]


def _text(value: Any, where: str) -> str:
    """A value as on the command line."""
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where} has a value that cannot stand on the command line: {error}") from None


def check_distinct(runs: Sequence[Run], configs: Sequence[Mapping[str, Any]]) -> None:
    """Require that no two runs have the same configuration.

    Raises:
        InputError: names two runs that have.
    """
    found: dict[str, Run] = {}
    for run, config in zip(runs, configs, strict=True):
        text = json.dumps(config, sort_keys=True, default=str)
        if other := found.get(text):
            raise InputError(f"{other.name} and {run.name} are the same run: all of their settings are equal")
        found[text] = run
