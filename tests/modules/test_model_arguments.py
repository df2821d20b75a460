"""Wrong values of the models' arguments are refused by name."""

import inspect
import math

import pytest
from lightning.pytorch import LightningModule
from tiny import tiny_mcn, tiny_pcnn

from pcnn_lightning import BNN, MCN, PCNN

MODELS = {
    PCNN: tiny_pcnn,
    MCN: tiny_mcn,
    BNN: lambda **given: BNN(**{"backbone": "wrn7", "widths": [2, 2, 2, 2], **given}),
}
MAY_BE_NONE = {
    *("widths", "gradient_clip", "init_from", "scale", "projection_forward", "projection_init"),
    *("image_size", "network", "convert", "class_weights", "teacher", "kernel_weight_decay"),
    *(f"projection_{name}" for name in ("schedule", "milestones", "decay", "warmup_epochs")),
}
NUMBERS = {
    *("num_classes", "in_channels", "dropout", "eta1", "decay", "warmup_epochs", "momentum", "weight_decay"),
    *("accumulate", "gradient_clip", "label_smoothing", "center_loss_weight", "center_loss_alpha", "center_loss_start"),
    *("distill_loss_weight", "task_loss_weight", "temperature"),
    *("eta2", "projection_decay", "projection_warmup_epochs", "projection_weight_decay"),
    *("projections", "sigma", "projection_loss_weight", "eta", "planes", "levels", "scale", "filter_loss_weight"),
}
SWITCHES = (
    *("full_precision", "nesterov", "compile", "channels_last", "reinit_projection", "average", "binarize"),
    *("small_images", "activation_threshold", "two_slopes"),
)
OTHERS = {
    **dict.fromkeys(SWITCHES, "bool"),
    "init_from": "str",
    "network": "str",
    "teacher": "str",
    "pretrained": r"bool \| str",
    "image_size": r"list\[int\]",
    "widths": r"list\[int\]",
    "milestones": r"list\[float\]",
}
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "0.5"]


def arguments_of(model):
    """The arguments of a model and of the models that it is derived from."""
    kinds = model.__mro__[: model.__mro__.index(LightningModule)]
    found = {name: one for kind in kinds for name, one in inspect.signature(kind.__init__).parameters.items()}
    return [name for name, one in found.items() if one.kind is one.KEYWORD_ONLY]


ARGUMENTS = [(model, name) for model in MODELS for name in arguments_of(model)]
every_argument = pytest.mark.parametrize(("model", "name"), ARGUMENTS)


def test_the_tables_name_arguments_that_there_are():
    names = {name for _, name in ARGUMENTS}
    assert names >= MAY_BE_NONE | NUMBERS
    assert {"eta1", "eta2", "projections", "planes", "scaling"} <= names


@every_argument
def test_an_argument_that_may_not_be_none_is_refused_by_name(model, name):
    if name in MAY_BE_NONE:
        MODELS[model](**{name: None})
    else:
        with pytest.raises(ValueError, match=rf"\b{name} must be .*, but got None$"):
            MODELS[model](**{name: None})


@pytest.mark.parametrize(("model", "name"), [pair for pair in ARGUMENTS if pair[1] in NUMBERS])
def test_what_is_no_number_is_refused_by_name(model, name):
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=rf"\b{name}\b.* must be .*, but got {value!r}"):
            MODELS[model](**{name: value})


@pytest.mark.parametrize(("model", "name"), [pair for pair in ARGUMENTS if pair[1] in OTHERS])
def test_what_is_of_another_kind_is_refused_by_name(model, name):
    for value in (math.nan, 1, 0.5, {"x"}):
        with pytest.raises(ValueError, match=rf"^{name} must be {OTHERS[name]}.*, but got {value!r}"):
            MODELS[model](**{name: value})


@pytest.mark.parametrize("prefix", ["", "projection_"])
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_milestones_that_are_no_numbers_are_refused_by_name(prefix, value):
    with pytest.raises(ValueError, match=rf"{prefix}milestones .*but got \[0.3, {value!r}\]"):
        tiny_pcnn(**{f"{prefix}schedule": "multistep", f"{prefix}milestones": [0.3, value]})
