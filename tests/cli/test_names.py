"""Short names on the command line: of models, data and the configurations that come along."""

from pathlib import Path

import pytest
from cli_helpers import DIGITS

from pcnn_lightning import data
from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.cli.names import class_names, with_packaged_configs

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=PCN", *DIGITS], "model must be one of PCNN, MCN, BNN, or the import path of a class, but got PCN"),
        (["--model=PCNN", "--data=Digit"], "data must be one of CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST"),
    ],
)
def test_a_name_that_is_not_known_is_answered_with_those_that_are(command, flags, message):
    command("fit", *flags).is_usage_error(message)


@pytest.mark.parametrize("argument", ["model", "data"])
@pytest.mark.parametrize("more", [[], ["--data=Digits"]])
def test_help_without_a_class_lists_the_classes(command, argument, more):
    run = command("fit", f"--{argument}.help", *more)
    assert run.code == 0
    assert all(name in run.out for name in class_names(argument))


def test_help_of_a_class_names_the_program_and_the_backbones(command):
    run = command("fit", "--model.help=PCNN")
    assert run.out.startswith("usage: pcnn_lightning")
    assert all(name in run.out for name in BACKBONES)


def test_the_data_listed_are_those_that_there_are():
    assert class_names("data") == [name for name in data.__all__ if name != "ImageDataModule"]
    assert {"Digits", "CIFAR10", "ImageFolder"} <= set(class_names("data"))


@pytest.mark.parametrize("given", [["--config", "{}"], ["-c", "{}"], ["--config={}"]])
@pytest.mark.parametrize("name", ["digits.yaml", "configs/digits.yaml"])
def test_a_configuration_of_the_package_is_found_by_its_name(given, name):
    args = ["fit", *(word.format(name) for word in given), "--trainer.max_epochs=1"]
    expected = ["fit", *(word.format(CONFIGS / "digits.yaml") for word in given), "--trainer.max_epochs=1"]
    assert with_packaged_configs(args) == expected


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text("run_dir: here\n")
    for words in (["--config", "digits.yaml"], ["--config", "other.yaml"], ["--config=../digits.yaml"], ["--config"]):
        assert with_packaged_configs(words) == words
