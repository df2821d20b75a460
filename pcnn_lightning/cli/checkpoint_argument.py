"""``--ckpt_path FILE``: the model that the file describes."""

import json
import re
from itertools import pairwise

from pcnn_lightning.checkpoints import load_checkpoint
from pcnn_lightning.families import FAMILIES

LINKED = {"num_classes": 10, "in_channels": 3}
"""Arguments that a model takes from its data, with their defaults."""


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
        if name not in LINKED and not name.startswith("_")
    }
    saved = checkpoint["one_bit"]
    class_path, family = saved.get("class_path"), FAMILIES.get(saved.get("family"))
    if family is not None and str(class_path).rpartition(".")[2] == family.module.rpartition(".")[2]:
        class_path = family.module  # where it is now, should the class have moved since
    return json.dumps({"model": {"class_path": class_path, "init_args": hparams}})


def packed_config(path: str) -> str:
    """The model of a packed file, as a configuration in JSON."""
    return json.dumps({"model": {"class_path": "pcnn_lightning.modules.PackedClassifier", "init_args": {"path": path}}})
