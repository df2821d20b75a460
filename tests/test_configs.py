"""The configurations: each can be read, built and, where it fits into a test, run."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import pcnn_lightning
from pcnn_lightning import MCN, PCNN
from pcnn_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = {"ddp", "debug", "gpu_bf16"}
EXPECTED = {  # backbone, J or K, first stage, 1-bit convolutions
    "cifar": ("wrn22", 4, "ternary", 18),
    "cifar100": ("wrn22", 4, "ternary", 18),
    "cifar_binary": ("wrn22", 4, "binary", 18),
    "cifar_full_precision": ("wrn22", 4, "full_precision", 0),
    "digits": ("wrn7", 1, "ternary", 3),
    "imagenet_resnet18": ("resnet18", 1, "binary", 16),
    "mcn_digits": ("mcn8", 4, "binary", 7),
    "mcn_cifar": ("mcn20", 4, "binary", 19),
    "mcn1_cifar": ("mcn20", 4, "binary", 19),
    "umcn_cifar": ("mcn20", 4, "full_precision", 19),
}
SHAPE = {  # classes, channels
    "cifar": (10, 3),
    "cifar100": (100, 3),
    "cifar_binary": (10, 3),
    "cifar_full_precision": (10, 3),
    "digits": (10, 1),
    "imagenet_resnet18": (1000, 3),
    "mcn_digits": (10, 1),
    "mcn_cifar": (10, 3),
    "mcn1_cifar": (10, 3),
    "umcn_cifar": (10, 3),
}
PLANES = {"PCNN": "projections", "MCN": "planes"}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

whole = pytest.mark.parametrize("name", EXPECTED)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pcnn_lightning"])


def read(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def parsed(capsys: pytest.CaptureFixture[str], *names: str) -> dict:
    """What the parser makes of some files laid over each other."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        main(["fit", *(f"--config={CONFIGS / name}.yaml" for name in names), "--print_config"])
    printed = capsys.readouterr()
    assert leave.value.code == 0, printed.err
    return yaml.safe_load(printed.out)


def contains(outer: object, inner: object) -> bool:
    """Whether all that ``inner`` says is in ``outer`` too; a class may be named by its path."""
    if isinstance(inner, dict):
        return isinstance(outer, dict) and all(contains(outer.get(key), value) for key, value in inner.items())
    if isinstance(inner, list):
        same_length = isinstance(outer, list) and len(outer) == len(inner)
        return same_length and all(contains(*pair) for pair in zip(outer, inner, strict=True))
    return outer == inner or (isinstance(outer, str) and outer.endswith(f".{inner}"))


def build(name: str) -> PCNN | MCN:
    model = read(name)["model"]
    num_classes, in_channels = SHAPE[name]
    built = getattr(pcnn_lightning, model["class_path"])(
        num_classes=num_classes, in_channels=in_channels, **model["init_args"]
    )
    assert isinstance(built, MCN if "mcn" in name else PCNN)
    return built


def arguments_of(name: str, callback: str) -> dict | None:
    """Arguments that a configuration gives to one of its callbacks; None if it does not have it."""
    found = [entry for entry in read(name)["trainer"]["callbacks"] if entry["class_path"] == callback]
    assert len(found) <= 1
    return found[0].get("init_args", {}) if found else None


def first_binary_epoch(name: str) -> float:
    """Of a progressive run, from an epoch or a share of the run."""
    switch = arguments_of(name, "StageSwitch")
    assert switch is not None
    return switch["epoch"] * (read(name)["trainer"]["max_epochs"] if switch["epoch"] < 1 else 1)


def test_all_are_looked_at():
    assert {path.stem for path in CONFIGS.iterdir()} == OVERLAYS | set(EXPECTED)


@pytest.mark.parametrize("name", sorted(OVERLAYS | set(EXPECTED)))
def test_says_what_it_is_for(name):
    first = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith((".", "gpu_bf16.yaml"))


@whole
def test_parses(capsys, name):
    assert contains(parsed(capsys, name), read(name))


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_overlay(capsys, overlay):
    """It changes what it names, and nothing else."""
    base, changed = parsed(capsys, "cifar"), parsed(capsys, "cifar", overlay)
    named = read(overlay)
    assert contains(changed, named)
    assert set(named) == {"trainer"}
    changed["trainer"] = {**changed["trainer"], **{key: base["trainer"][key] for key in named["trainer"]}}
    assert changed == base


@whole
def test_model(name):
    model = build(name)
    backbone, planes, stage, count = EXPECTED[name]
    assert model.hparams["backbone"] == backbone
    assert model.hparams[PLANES[type(model).__name__]] == planes
    assert model.stage == stage
    layers = [layer for layer in model.one_bit_layers if layer.kernel_size == (3, 3)]
    assert [layer.out_channels // len(layer.weight) for layer in layers] == [planes] * count
    if isinstance(model, PCNN):
        assert {layer.levels for layer in layers} <= {stage}
    else:
        assert {layer.average for layer in layers} == {name == "mcn1_cifar"}
        assert {layer.binarize for layer in layers} == {stage == "binary"}


@whole
def test_data(name, tmp_path):
    data = read(name)["data"]
    arguments = data["init_args"]
    if data["class_path"] == "ImageFolder":
        (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
        arguments = {**arguments, "root": str(tmp_path / "images")}
        getattr(pcnn_lightning, data["class_path"])(**arguments)
    else:
        built = getattr(pcnn_lightning, data["class_path"])(**arguments)
        assert (built.num_classes, built.in_channels) == SHAPE[name]


@whole
def test_stages_in_order(name):
    """Exactly the ternary ones are switched, early enough to train in the binary stage."""
    model, max_epochs = build(name), read(name)["trainer"]["max_epochs"]
    assert (arguments_of(name, "StageSwitch") is not None) == (model.stage == "ternary")
    if model.stage == "ternary":
        assert 1 <= first_binary_epoch(name) < max_epochs
        assert first_binary_epoch(name) == int(first_binary_epoch(name))


@whole
def test_runs_are_kept_apart(name):
    trainer = read(name)["trainer"]
    checkpoints = arguments_of(name, "StageCheckpoint")
    assert checkpoints is not None
    assert trainer["logger"]["init_args"]["name"] == name
    assert checkpoints["dirpath"] == f"{trainer['logger']['init_args']['save_dir']}/{name}/checkpoints"
    assert arguments_of(name, "LossCurves") is not None


@pytest.mark.parametrize("name", ["cifar", "cifar_binary"])
def test_published_setting(name):
    """As published: 0.1, times 0.2 at 60, 120 and 160 of 200 epochs, and batches of 128."""
    config, model = read(name), build(name)
    hparams = model.hparams
    assert config["trainer"]["max_epochs"] == 200
    assert config["data"]["init_args"]["batch_size"] == 128
    assert (hparams["optimizer"], hparams["momentum"], hparams["nesterov"]) == ("sgd", 0.9, True)
    assert hparams["weight_decay"] == 3e-4
    assert hparams["projection_loss_weight"] == 1e-4
    assert {layer.projection_loss_weight for layer in model.projection_layers} == {1e-4}
    rates = [model.rates[0].at(epoch, 200) for epoch in range(200)]
    rates[0] = rates[1]  # but for a warm-up, which is ours
    assert model.hparams["warmup_epochs"] <= 1
    assert [epoch for epoch, (one, other) in enumerate(pairwise(rates), 1) if one != other] == [60, 120, 160]
    assert [rates[epoch] for epoch in (1, 60, 120, 160)] == pytest.approx([0.1, 0.02, 0.004, 0.0008])
    data = getattr(pcnn_lightning, config["data"]["class_path"])(**config["data"]["init_args"])
    assert (data.crop_padding, data.flip) == (4, True)


def test_twins_differ_only_where_they_say():
    """cifar100 is cifar on other images; the full-precision one is cifar_binary with ordinary convolutions."""
    cifar, cifar100 = read("cifar"), read("cifar100")
    for config in (cifar, cifar100):
        del config["data"]["class_path"], config["trainer"]["logger"], config["trainer"]["callbacks"]
    assert cifar == cifar100
    binary, full = read("cifar_binary"), read("cifar_full_precision")
    assert binary["data"] == full["data"]
    ours, theirs = build("cifar_binary").hparams, build("cifar_full_precision").hparams
    assert {key for key in ours if ours[key] != theirs[key]} <= {"full_precision", "projection_loss_weight", "eta2"}


def test_modulated_networks_differ_only_where_they_say():
    """MCN-1 and U-MCN are MCN but for one key; the decay is that of the published runs."""
    of_mcn = read("mcn_cifar")
    for name, key, value in (("mcn1_cifar", "average", True), ("umcn_cifar", "binarize", False)):
        config = read(name)
        assert config["model"]["init_args"].pop(key) is value
        assert config["model"] == of_mcn["model"]
        assert config["data"] == of_mcn["data"]
    assert of_mcn["trainer"]["max_epochs"] == 200
    assert of_mcn["model"]["init_args"]["stages"] == [16, 16, 32, 64]


@pytest.mark.parametrize("name", ["digits", "mcn_digits"])
def test_digits_runs(name):
    cli = main(["fit", f"--config={CONFIGS / name}.yaml", f"--config={CONFIGS / 'debug.yaml'}", *QUIET])
    assert cli.trainer.global_step == 1
    assert cli.model.stage == EXPECTED[name][2]


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - {"digits", "mcn_digits"}))
def test_runs_on_a_folder(tmp_path, name):
    """A step with small images and few channels, started as the comments in cifar.yaml tell."""
    rng = np.random.default_rng(0)
    evaluation = "val" if name == "imagenet_resnet18" else "test"
    for split in ("train", evaluation):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    if name == "imagenet_resnet18":
        flags = ["--data.init_args.root=images", "--data.image_size=32", "--data.num_workers=0"]
        flags += ["--model.stages=[2,2,2,4,4]", "--data.batch_size=4"]
    else:
        flags = ["--data=ImageFolder", "--data.root=images", "--data.batch_size=4", "--model.stages=[2,2,4,4]"]
    files = [f"--config={CONFIGS / name}.yaml", f"--config={CONFIGS / 'debug.yaml'}"]
    flags.append("--model.compile=false")  # which takes a minute
    cli = main(["fit", *files, *flags, *QUIET, "--trainer.accelerator=cpu"])
    assert cli.trainer.global_step == 1
    assert cli.model.hparams["num_classes"] == 2
    assert cli.model.stage == EXPECTED[name][2]
    assert all(parameter.isfinite().all() for parameter in cli.model.parameters())
