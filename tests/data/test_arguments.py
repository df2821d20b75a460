"""Each argument of each data module, given what it cannot be."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from made_images import make_folder

from pcnn_lightning import data
from pcnn_lightning.data import MNIST, ImageDataModule, ImageFolder, WebDataset

KINDS: list[type[ImageDataModule]] = [getattr(data, name) for name in data.__all__ if name != "ImageDataModule"]
INTEGERS = {"batch_size": 1, "num_workers": 0, "train_size": 1, "seed": 0, "crop_padding": 0, "image_size": 1}
INTEGERS["num_classes"] = 1
PATHS = {"root", "predict_dir", "cache_dir"}
BOOLS = {"flip", "in_memory", "grayscale", "skip_corrupt", "weighted_sampling"}
MAY_BE_NONE = {"train_size", "image_size", "in_memory", "predict_dir"}
MAY_BE_NONE |= {"grayscale", "num_classes", "classes", "mean", "std", "train", "val", "test", "cache_dir"}


def arguments_of(kind: type[ImageDataModule]) -> list[str]:
    given = {
        name for one in kind.__mro__ if issubclass(one, ImageDataModule) for name in inspect.signature(one).parameters
    }
    return sorted(given - {"kwargs"})


def allowed_for(argument: str) -> tuple[str, list[Any]]:
    """What the message says is allowed, and values that are not."""
    if argument in INTEGERS:
        minimum = INTEGERS[argument]
        return f"an integer of at least {minimum}", [minimum - 1, float("nan"), 2.0, "2", True, [2]]
    if argument in BOOLS:
        return "true or false", [1, 0.0, float("nan"), "yes", "false", []]
    if argument in PATHS:
        return "a path", [3, float("nan"), True, b"data", ["data"]]
    if argument in ("train", "val", "test"):
        return "a path or a list of paths", [3, True, [], ["a", 3], {"a": "b"}, b"data"]
    if argument.endswith("_column"):
        return "the name of a column", [3, True, b"image", ["image"]]
    if argument == "classes":
        return "a list of different names", [[], "ab", [1, 2], ["a", "a"], ["a", ""], {"a": 1}]
    if argument in ("mean", "std"):
        wrong = [0.5, [0.5], [0.5] * 4, ["a"] * 3, [0.5, 0.5, float("nan")], [0.5, -1, 0.5], [0.5, float("inf"), 0.5]]
        return f"a list of 3 numbers of at least {0 if argument == 'mean' else 1e-06}", wrong
    if argument in ("mixup_alpha", "cutmix_alpha"):
        return "a number of at least 0", [-0.1, float("nan"), float("inf"), "0.1", True, [1.0]]
    if argument == "random_erasing":
        return "a number in [0, 1]", [-0.1, 1.1, float("nan"), float("inf"), "0.1", True]
    assert argument == "val_fraction"
    return "a number in [0, 1)", [1, 1.0, -0.1, float("nan"), float("inf"), "0.1", True]


@pytest.mark.parametrize(
    ("kind", "argument"), [(kind, argument) for kind in KINDS for argument in arguments_of(kind)], ids=str
)
def test_what_an_argument_cannot_be_is_named(tmp_path, kind, argument):
    needed: dict[str, Any] = {}
    if kind is ImageFolder:
        needed["root"] = str(make_folder(tmp_path, {"train": {"a": 1}}))
    elif issubclass(kind, WebDataset):
        needed["classes"] = ["a"]
    allowed, values = allowed_for(argument)
    for value in values if argument in MAY_BE_NONE else [*values, None]:
        with pytest.raises(ValueError, match=f"^{re.escape(f'{argument} must be {allowed}, but got {value!r}')}$"):
            kind(**{**needed, argument: value})
    if argument in MAY_BE_NONE:
        kind(**{**needed, argument: None} if argument != "classes" else {**needed, argument: None, "num_classes": 1})


def test_paths_may_be_objects(tmp_path):
    root = make_folder(tmp_path, {"train": {"a": 1}})
    assert ImageFolder(Path(root), predict_dir=Path(root)).root == root  # type: ignore[arg-type]
    assert MNIST(Path(root)).root == root  # type: ignore[arg-type]
