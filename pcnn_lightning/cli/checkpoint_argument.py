"""``--ckpt_path FILE``: the model that the file describes."""

import json
import re
from itertools import pairwise
from typing import Any

from pcnn_lightning.checkpoints import load_checkpoint
from pcnn_lightning.deploy import load_packed
from pcnn_lightning.families import module_of
from pcnn_lightning.files import is_packed

LINKED = {"num_classes": 10, "in_channels": 3}
"""Arguments that a model takes from its data, with their defaults; ``image_size`` is another one."""


def checkpoint_argument(args: list[str]) -> str | None:
    """The file given as ``--ckpt_path FILE`` or ``--ckpt_path=FILE``, if any."""
    for argument, following in reversed(list(pairwise([*args, ""]))):  # the parser takes the last one
        if argument == "--ckpt_path" or argument.startswith("--ckpt_path="):
            path = argument.partition("=")[2] or following
            return None if path in ("best", "last", "null", "") else path
    return None


def without_checkpoint(args: list[str]) -> list[str]:
    """The arguments without ``--ckpt_path``."""
    words = pairwise(["", *args])
    return [word for before, word in words if before != "--ckpt_path" and not re.match("--ckpt_path(=|$)", word)]


def model_config(path: str) -> str:
    """The model of a checkpoint, as a configuration in JSON."""
    checkpoint = load_checkpoint(path)
    hparams = {
        name: value
        for name, value in checkpoint["hyper_parameters"].items()
        if name not in (*LINKED, "image_size") and not name.startswith("_")
    }
    return json.dumps({"model": {"class_path": module_of(checkpoint["one_bit"]), "init_args": hparams}})


def packed_config(path: str) -> str:
    """The model of a packed file, as a configuration in JSON."""
    return json.dumps({"model": {"class_path": "pcnn_lightning.modules.PackedClassifier", "init_args": {"path": path}}})


def image_arguments(path: str) -> dict[str, Any]:
    """The arguments of ``ImageFolder`` for images like those that the network of a file was trained on."""
    if is_packed(path):
        about: dict[str, Any] = vars(load_packed(path).description)
        about |= {"image_shape": (about["in_channels"], *about["image_size"]), "classes": about["class_names"]}
    else:
        parts = load_checkpoint(path).values()  # that of the data is under the name of its class
        about = next((part for part in parts if isinstance(part, dict) and "image_shape" in part), {})
        if not about:
            return {}
    channels, height, width = about["image_shape"]
    names = None if about["classes"] is None else list(about["classes"])
    if names and any(name != name.encode(errors="replace").decode() for name in names):
        names = None  # a configuration cannot hold bytes that are not UTF-8
    return {
        "num_classes": about.get("num_classes") or len(about["classes"]),
        "classes": names,
        "grayscale": channels == 1,
        "image_size": height if height == width else None,
        "mean": list(about["mean"]),
        "std": list(about["std"]),
        "in_memory": about.get("in_memory"),
    }
