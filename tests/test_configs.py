"""The configurations: each can be read, built and, where it fits into a test, run."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import pcnn_lightning
from pcnn_lightning import OneBitClassifier
from pcnn_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = {"cpu_bf16", "ddp", "debug", "gpu_bf16"}
RUNS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in OVERLAYS)
SHAPE = {"Digits": (10, 1), "CIFAR10": (10, 3), "CIFAR100": (100, 3), "ImageFolder": (1000, 3)}  # classes, channels
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

whole = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pcnn_lightning"])


def read(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def parsed(capsys: pytest.CaptureFixture[str], *names: str) -> dict:
    """The configuration that the parser makes of several files."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        main(["fit", *(f"--config={CONFIGS / name}.yaml" for name in names), "--print_config"])
    printed = capsys.readouterr()
    assert leave.value.code == 0, printed.err
    return yaml.safe_load(printed.out)


def contains(outer: object, inner: object) -> bool:
    """Whether ``outer`` has all that ``inner`` has; a class may be given by its path, or by its arguments alone."""
    if isinstance(inner, dict):
        if isinstance(outer, dict) and "init_args" in outer and "class_path" not in inner:
            outer = outer["init_args"]
        return isinstance(outer, dict) and all(contains(outer.get(key), value) for key, value in inner.items())
    if isinstance(inner, list):
        if not isinstance(outer, list) or len(outer) != len(inner):
            return False
        return all(contains(*pair) for pair in zip(outer, inner, strict=True))
    return outer == inner or (isinstance(outer, str) and outer.endswith(f".{inner}"))


def build(name: str) -> OneBitClassifier:
    config = read(name)
    num_classes, in_channels = SHAPE[config["data"]["class_path"]]
    family = getattr(pcnn_lightning, config["model"]["class_path"])
    return family(num_classes=num_classes, in_channels=in_channels, **config["model"]["init_args"])


@pytest.mark.parametrize("name", [*RUNS, *sorted(OVERLAYS)])
def test_the_first_line_says_what_it_is_for(name):
    first = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith((".", "_bf16.yaml"))


@whole
def test_is_short_and_has_a_folder_of_its_own(name):
    assert len((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()) <= 25
    assert read(name)["run_dir"] == f"runs/{name}"


@whole
def test_parses(capsys, name):
    assert contains(parsed(capsys, name), read(name))


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_overlay(capsys, overlay):
    """An overlay changes only the settings that it names."""
    base, changed = parsed(capsys, "cifar"), parsed(capsys, "cifar", overlay)
    named = read(overlay)
    assert contains(changed, named)
    assert set(named) == {"trainer"}
    changed["trainer"] = {**changed["trainer"], **{key: base["trainer"][key] for key in named["trainer"]}}
    assert changed == base


EXPECTED = {  # family, backbone, J or K, stage, and what else must hold for each 1-bit layer
    "cifar": ("PCNN", "wrn22", 4, "ternary", {"projection_loss_weight": 1e-4}),
    "cifar100": ("PCNN", "wrn22", 4, "ternary", {}),
    "cifar_binary": ("PCNN", "wrn22", 4, "binary", {"projection_loss_weight": 1e-4}),
    "cifar_distilled": ("PCNN", "wrn22", 4, "binary", {}),
    "cifar_short": ("PCNN", "wrn10", 1, "binary", {"projection_loss_weight": 1e-4}),
    "digits": ("PCNN", "wrn7", 1, "ternary", {}),
    "resnet20_cifar": ("BNN", "wrn22", 1, "binary", {"normalization": "standardize"}),
    "imagenet_resnet18": ("PCNN", "resnet18", 1, "binary", {}),
    "imagenet_resnet18_progressive": ("PCNN", "resnet18", 1, "ternary", {}),
    "mcn_digits": ("MCN", "mcn8", 4, "binary", {"average": False, "binarize": True}),
    "mcn_cifar": ("MCN", "mcn20", 4, "binary", {"average": False, "binarize": True}),
    "mcn1_cifar": ("MCN", "mcn20", 4, "binary", {"average": True, "binarize": True}),
    "umcn_cifar": ("MCN", "mcn20", 4, "real", {"average": False, "binarize": False}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_layers(name):
    family, backbone, planes, stage, attributes = EXPECTED[name]
    model = build(name)
    assert (model.family, model.hparams["backbone"], model.planes, model.stage) == (family, backbone, planes, stage)
    depth = {"wrn22": 18, "wrn10": 6, "wrn7": 3, "resnet18": 16, "mcn20": 19, "mcn8": 7}[backbone]
    layers = [layer for layer in model.one_bit_layers.values() if layer.kernel_size == (3, 3)]
    assert len(layers) == depth
    for layer in layers:
        assert layer.stage == stage
        assert layer.out_channels // len(layer.weight) == planes
        assert {attribute: getattr(layer, attribute) for attribute in attributes} == attributes


def test_the_full_precision_network_has_no_1_bit_layers():
    model = build("cifar_full_precision")
    assert (model.stage, model.one_bit_layers) == ("full_precision", {})


@whole
def test_data(name):
    """Classes and channels are known before there are any images."""
    data = read(name)["data"]
    built = getattr(pcnn_lightning, data["class_path"])(**data["init_args"])
    assert (built.num_classes, built.in_channels) == SHAPE[data["class_path"]]


@whole
def test_exactly_the_ternary_runs_are_switched_early_enough(name):
    config = read(name)
    assert ("stage_switch" in config) == (build(name).stage == "ternary")
    if "stage_switch" in config:
        first_binary_epoch = config["stage_switch"]["epoch"] * config["trainer"]["max_epochs"]
        assert 1 <= first_binary_epoch < config["trainer"]["max_epochs"]
        assert first_binary_epoch == int(first_binary_epoch)


@pytest.mark.parametrize("name", ["cifar", "cifar_binary"])
def test_published_setting(name):
    """As published: 0.1, times 0.2 at 60, 120 and 160 of 200 epochs, and batches of 128."""
    config, model = read(name), build(name)
    hparams = model.hparams
    assert config["trainer"]["max_epochs"] == 200
    assert config["data"]["init_args"]["batch_size"] == 128
    assert (hparams["optimizer"], hparams["momentum"], hparams["nesterov"]) == ("sgd", 0.9, True)
    assert hparams["weight_decay"] == 3e-4
    rates = [model.groups["kernels"].rate.at(epoch, 200) for epoch in range(200)]
    rates[0] = rates[1]  # apart from a warm-up, which is ours
    assert model.hparams["warmup_epochs"] <= 1
    assert [epoch for epoch, (one, other) in enumerate(pairwise(rates), 1) if one != other] == [60, 120, 160]
    assert [rates[epoch] for epoch in (1, 60, 120, 160)] == pytest.approx([0.1, 0.02, 0.004, 0.0008])
    data = getattr(pcnn_lightning, config["data"]["class_path"])(**config["data"]["init_args"])
    assert (data.crop_padding, data.flip) == (4, True)


def test_twins_differ_in_the_stated_settings_only():
    """cifar100 is cifar with other images; the full-precision twin is cifar_binary with ordinary convolutions."""
    cifar, cifar100 = read("cifar"), read("cifar100")
    for config in (cifar, cifar100):
        del config["data"]["class_path"], config["run_dir"]
    assert cifar == cifar100
    imagenet, progressive = read("imagenet_resnet18"), read("imagenet_resnet18_progressive")
    del imagenet["run_dir"], progressive["run_dir"], progressive["stage_switch"]
    assert (imagenet["model"]["init_args"].pop("stage"), progressive["model"]["init_args"].pop("stage")) == (
        "binary",
        "ternary",
    )
    assert imagenet == progressive
    assert read("cifar_binary")["data"] == read("cifar_full_precision")["data"]
    assert {**build("cifar_binary").twin().hparams} == {**build("cifar_full_precision").hparams}


def test_the_teacher_is_the_twin_of_its_student():
    """With the widths and J of the student, where the run of its configuration leaves it."""
    of_student, of_teacher = read("cifar_distilled"), read("cifar_full_precision")
    teacher = of_student["model"]["init_args"]["teacher"]
    assert teacher == f"{of_teacher['run_dir']}/version_0/checkpoints/full_precision.ckpt"
    assert of_student["data"] == of_teacher["data"]
    twin, trained = ({**model.hparams} for model in (build("cifar_distilled").twin(), build("cifar_full_precision")))
    different = {name for name in twin if twin[name] != trained[name]}
    assert different == {"temperature", "distill_loss_weight", "task_loss_weight"}


def test_mcn_variants_differ_in_one_setting():
    of_mcn = read("mcn_cifar")
    for name, key, value in (("mcn1_cifar", "average", True), ("umcn_cifar", "binarize", False)):
        config = read(name)
        assert config["model"]["init_args"].pop(key) is value
        assert config["model"] == of_mcn["model"]
        assert config["data"] == of_mcn["data"]
    assert of_mcn["trainer"]["max_epochs"] == 200
    assert of_mcn["model"]["init_args"]["widths"] == [16, 16, 32, 64]


@pytest.mark.parametrize("name", ["digits", "mcn_digits"])
def test_digits_runs(name):
    cli = main(["fit", f"--config={CONFIGS / name}.yaml", f"--config={CONFIGS / 'debug.yaml'}", *QUIET])
    assert cli.trainer.global_step == 1
    assert cli.model.stage == build(name).stage
    assert not list(Path().rglob("*")), "debug.yaml promises no files"


@pytest.mark.parametrize("name", sorted(set(RUNS) - {"digits", "mcn_digits"}))
def test_runs_on_a_folder(tmp_path, name):
    """One step with small images and few channels, started as described in cifar.yaml."""
    rng = np.random.default_rng(0)
    imagenet = name.startswith("imagenet_")
    evaluation = "val" if imagenet else "test"
    for split in ("train", evaluation):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    if imagenet:
        flags = ["--data.init_args.root=images", "--data.num_classes=2", "--data.image_size=32"]
        flags += ["--model.widths=[2,2,2,4,4]", "--data.num_workers=0", "--data.batch_size=4"]
    else:
        flags = ["--data=ImageFolder", "--data.root=images", "--data.batch_size=4"]
        flags += [] if name.startswith("convert_") else ["--model.widths=[2,2,4,4]"]
    files = [f"--config={CONFIGS / name}.yaml", f"--config={CONFIGS / 'debug.yaml'}"]
    flags.append("--model.compile=false")  # compilation takes a minute
    flags += ["--model.teacher=null"] if name == "cifar_distilled" else []
    cli = main(["fit", *files, *flags, *QUIET, "--trainer.accelerator=cpu"])
    assert cli.trainer.global_step == 1
    assert cli.model.hparams["num_classes"] == 2
    plan = read(name).get("stage_plan")
    assert cli.model.stage == (plan["stages"][0]["stage"] if plan else build(name).stage)
    assert all(parameter.isfinite().all() for parameter in cli.model.parameters())
