"""Short names on the command line: of models, data and the configurations of this package."""

from pathlib import Path

import pytest
from cli_helpers import DIGITS

from pcnn_lightning import data
from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.cli.names import class_names, with_packaged_configs
from pcnn_lightning.families import FAMILIES

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _own_families(monkeypatch):
    """Without those that other tests have registered."""
    for name in FAMILIES.keys() - {"PCNN", "MCN", "BNN"}:
        monkeypatch.delitem(FAMILIES, name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=PCN", *DIGITS], "model must be one of PCNN, MCN, BNN"),
        (["--model=PCNN", "--data=Digit"], "data must be one of CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST"),
        ([], "--model (one of PCNN, MCN, BNN) and --data (one of CIFAR10"),
        (DIGITS, "--model (one of PCNN, MCN, BNN) must be given, or a configuration that has it"),
        (
            ["--config=digit.yaml"],
            "there is no configuration digit.yaml; those of this package need no folder: bnn_cif",
        ),
        (["--config=configs/digit.yaml"], "there is no configuration configs/digit.yaml; those"),
        ([*DIGITS, "--model=PCNN", "--trainer.logger=Foo"], "trainer.logger: no class Foo fits here"),
        ([*DIGITS, "--model=nowhere.Foo"], "model: nowhere.Foo: No module named 'nowhere'"),
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


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.optimizer=sdg", "optimizer must be one of sgd, adam, but got sdg"),
        ("--model.eta1=fast", "eta1 must be float, but got fast"),
        ("--model.gradient_clip=x", "gradient_clip must be float or null, but got x"),
        ("--trainer.max_epochs=ten", "trainer.max_epochs must be int or null, but got ten"),
        ("--trainer.logger=CSVLogger", "CSVLogger: the following arguments are required: save_dir"),
    ],
)
def test_a_value_of_another_type_is_answered_with_the_type(command, flag, message):
    run = command("fit", *DIGITS, "--model=PCNN", flag)
    run.is_usage_error(message)
    assert len(run.err.strip().splitlines()) == 2, "a tip and the error"


def test_help_of_the_program_lists_all_names_in_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = command("--help").out
    listed = [*class_names("model"), *class_names("data"), *(path.name for path in CONFIGS.glob("*.yaml"))]
    assert all(name in said for name in listed)
    assert max(len(line) for line in said.splitlines()) <= 80
