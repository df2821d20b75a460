"""Settings of runs, values of sweeps and published numbers: YAML files, of which only text is made."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from pcnn_lightning.errors import InputError

LONGEST_FILE = 2**18
"""Upper bound of the bytes in a YAML file; a larger one is not read."""
FRACTION = r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?"
"""A number that is not written as a whole one. To YAML, 1e-4 would be text."""

WITHOUT_EFFECT = (
    *("logger", "default_root_dir", "log_every_n_steps", "num_sanity_val_steps", "profiler"),
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams"),
)
"""Arguments of the Trainer that change nothing in what a run learns."""


@dataclass(frozen=True)
class Published:
    """A published accuracy in per cent, as it is written in the file, and where it was published."""

    accuracy: str
    source: str


def read_settings(folder: Path) -> dict[str, str]:
    """Read the settings of a run as text, by name: model, hyperparameters, data, seed and length, as far as recorded.

    Files that cannot be read give no settings, whatever is in them.
    """
    config = _read_if_whole(folder / "config.yaml")
    model, data, trainer = (_fields(config.get(part)) for part in ("model", "data", "trainer"))
    plans = {part: _fields(_fields(config.get(part)).get("init_args")) for part in ("stage_switch", "stage_plan")}
    settings = {
        "model": _text(model.get("class_path")).rpartition(".")[2],
        **{name: _text(node) for name, node in _fields(model.get("init_args")).items()},
        **{
            name: _text(node) for name, node in _read_if_whole(folder / "hparams.yaml").items()
        },  # of a TensorBoardLogger
        "data": _text(data.get("class_path")).rpartition(".")[2],
        **{f"data.{name}": _text(node) for name, node in _fields(data.get("init_args")).items()},
        **{f"{part}.{name}": _text(node) for part, fields in plans.items() for name, node in fields.items()},
        **{name: _text(node) for name, node in trainer.items() if name not in WITHOUT_EFFECT},
        "seed_everything": _text(config.get("seed_everything")),
    }
    return {name: text for name, text in settings.items() if text and not name.startswith("_")}


def read_sweep(file: Path) -> dict[str, dict[str, str]]:
    """Read the runs of ``sweep.yaml``: the values of each as text, by the name of its folder.

    Raises:
        InputError: if that is not what the file holds.
    """
    runs = _read_fields(file).get("runs")
    if not isinstance(runs, yaml.MappingNode) or not runs.value:
        raise InputError(f"{file}: runs must be a mapping from folders to values, but got {_said(runs)}")
    found: dict[str, dict[str, str]] = {}
    for key, values in runs.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else ""
        if name in ("", "..") or Path(name).name != name or not name.isprintable() or len(name.encode()) > 255:
            raise InputError(f"{file}: a run must be named as its folder beside this file, but got {_said(key)}")
        if not isinstance(values, yaml.MappingNode):
            raise InputError(f"{file}: {name} must be a mapping from settings to values, but got {_said(values)}")
        found[name] = {setting: _text(value) for setting, value in _fields(values).items()}
    return found


def read_published(file: Path) -> dict[str, Published]:
    """Read published accuracies by the label of the row that they belong to.

    Raises:
        InputError: if the file holds anything but a mapping from labels to ``{accuracy: PER CENT, source: TEXT}``.
    """
    found: dict[str, Published] = {}
    for label, node in _read_fields(file).items():
        of_row = _fields(node)
        if of_row.keys() != {"accuracy", "source"}:
            raise InputError(f"{file}: {shown(label)} must be {{accuracy: ..., source: ...}}, but got {_said(node)}")
        accuracy, source = _text(of_row["accuracy"]), of_row["source"]
        if not re.fullmatch(r"\d{1,3}(\.\d{1,9})?", accuracy) or float(accuracy) > 100:
            got = _said(of_row["accuracy"])
            raise InputError(f"{file}: accuracy of {shown(label)} must be a number from 0 to 100, but got {got}")
        if not isinstance(source, yaml.ScalarNode) or not source.tag.endswith(":str"):
            raise InputError(f"{file}: source of {shown(label)} must be text, but got {_said(source)}")
        written = re.sub(rf"(?<==){FRACTION}(?=,|$)", lambda number: plain_number(number[0]), label)
        found[shown(written)] = Published(of_row["accuracy"].value, source.value)
    return found


def plain_number(text: str) -> str:
    """Write a number the same way however it was written: 1e-4 as 0.0001, 1.0 as 1. Other text stays as it is."""
    return repr(float(text)).removesuffix(".0") if re.fullmatch(FRACTION, text) else text


def shown(text: str) -> str:
    """Escape what cannot be printed."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _read_fields(file: Path) -> dict[str, yaml.Node]:
    """Read the fields of a YAML file as nodes: values made of them could be endless, or run code."""
    if not file.is_file():
        raise InputError(f"{file}: there is no such file")
    if file.stat().st_size > LONGEST_FILE:
        raise InputError(f"{file} has {file.stat().st_size} bytes: at most {LONGEST_FILE} are read")
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError:
        raise
    except Exception as error:  # yaml raises what it likes
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        reason = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{file} is not YAML: {line}{shown(str(reason))}") from error
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{file} must hold a mapping, but got {_said(node)}")
    return _fields(node)


def _read_if_whole(file: Path) -> dict[str, yaml.Node]:
    try:
        return _read_fields(file)
    except (InputError, OSError):  # only labels need it, which can be folder names
        return {}


def _fields(node: yaml.Node | None) -> dict[str, yaml.Node]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}


def _text(node: yaml.Node | None) -> str:
    """The text of a value; of a collection, its first 200 pieces."""
    return "" if node is None else "".join(islice(_pieces(node), 200))


def _said(node: yaml.Node | None) -> str:
    """A value for a message."""
    return shown(_text(node)[:80]) or "nothing"


def _pieces(node: yaml.Node) -> Iterator[str]:
    """Yield the text of a value in pieces, which may never end: through an alias, a list can contain itself."""
    if isinstance(node, yaml.ScalarNode):
        yield plain_number(node.value)
        return
    mapping = isinstance(node, yaml.MappingNode)
    left, right = "{}" if mapping else "()" if node.tag.endswith("/tuple") else "[]"
    yield left
    for index, item in enumerate(node.value):
        *key, value = item if mapping else [item]
        yield ", " if index else ""
        for name in key:
            yield from _pieces(name)
            yield ": "
        yield from _pieces(value)
    yield right
