"""The command line, called in-process as a user calls it."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pcnn_lightning
from pcnn_lightning import PCNN, Digits, ImageFolder
from pcnn_lightning.checkpoints import AtomicCheckpointIO
from pcnn_lightning.cli import OneBitCLI, main
from pcnn_lightning.deploy import freeze, load_packed

ROOT = Path(__file__).parents[1]
DIGITS = ["--data=Digits", "--data.train_size=64", "--data.image_size=8", "--data.batch_size=32"]
NETWORK = [
    "--model=PCNN",
    "--model.backbone=wrn7",
    "--model.stages=[2,2,2,2]",
    "--model.projections=2",
    "--model.eta2=0.01",
]
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
TRAINING = [*NETWORK, *QUIET, "--trainer.max_epochs=1"]
FIT = ["fit", *DIGITS, *TRAINING]
KEEP = ["--trainer.callbacks+=StageCheckpoint", "--trainer.callbacks.dirpath=kept"]
SWITCH = ["--model.stage=ternary", "--trainer.callbacks+=StageSwitch", "--trainer.callbacks.epoch=1"]


class WrongLabels(LightningDataModule):
    """Says that it has three classes, and has the label ``label`` among its 0, 1 and 2."""

    num_classes, in_channels = 3, 1

    def __init__(self, label: int) -> None:
        super().__init__()
        self.labels = torch.tensor([0, 1, 2, label])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), self.labels), batch_size=4)


class Poison(Callback):
    """Turns a parameter into NaN at the start of the second epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            next(pl_module.parameters()).data.fill_(float("nan"))


class Run(NamedTuple):
    """What is left of a command."""

    code: object
    out: str
    err: str
    cli: OneBitCLI | None

    def is_refused(self, *mentioned: str, code: int = 2) -> None:
        """Fail unless the command ended in one line that mentions all of these."""
        __tracebackhide__ = True
        assert self.code == code, self.err
        assert self.err.startswith("pcnn_lightning: error: ")
        assert len(self.err.splitlines()) == 1, f"more than one line:\n{self.err}"
        for what in mentioned:
            assert what in self.err, f"{what!r} is not mentioned: {self.err}"

    def is_usage_error(self, *mentioned: str) -> None:
        """Fail unless the parser refused the command with a message that mentions all of these."""
        __tracebackhide__ = True
        assert self.code == 2, f"exit status {self.code}: {self.err}"
        assert "Traceback" not in self.err
        message = self.err.rpartition("error:")[2]
        for what in mentioned:
            assert what in message, f"{what!r} is not mentioned: {message}"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pcnn_lightning"])
    monkeypatch.delenv("PCNN_LIGHTNING_TRACEBACK", raising=False)

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        code: object = 0
        cli = None
        try:
            cli = main([str(argument) for argument in arguments])
        except SystemExit as leave:
            code = leave.code
        return Run(code, *capsys.readouterr(), cli)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint folder of a progressive run: a ternary epoch and a binary one."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pcnn_lightning"])
        main([*FIT, "--trainer.max_epochs=2", *SWITCH, *KEEP, "--model.eta1=0.05"])
    return folder / "kept"


def in_folder(folder: Path) -> list[str]:
    """The flags that let a command find the checkpoints of ``folder`` by ``last`` and ``best``."""
    return ["--trainer.callbacks+=StageCheckpoint", f"--trainer.callbacks.dirpath={folder}"]


def make_folder(root: Path, counts: dict[str, int], splits: tuple[str, ...] = ("train", "test")) -> Path:
    """Write ``counts[class]`` random PNGs of 8×8 for each split."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def tensors_in(checkpoint: object) -> list[Tensor]:
    """All tensors of a checkpoint, the optimizer's too."""
    if isinstance(checkpoint, Tensor):
        return [checkpoint]
    if isinstance(checkpoint, dict):
        return [tensor for value in checkpoint.values() for tensor in tensors_in(value)]
    if isinstance(checkpoint, list | tuple):
        return [tensor for value in checkpoint for tensor in tensors_in(value)]
    return []


def same_weights(one: LightningModule, other: LightningModule) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


class TestStarting:
    def test_version(self, command):
        run = command("--version")
        assert (run.code, run.out.strip()) == (0, f"pcnn_lightning {pcnn_lightning.__version__}")

    def test_as_a_module(self):
        run = subprocess.run(
            [sys.executable, "-m", "pcnn_lightning", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (run.returncode, run.stdout.strip()) == (0, f"pcnn_lightning {pcnn_lightning.__version__}"), run.stderr

    def test_console_script(self):
        declared = re.search(r'^pcnn-lightning = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert declared is not None
        assert resolve_name(declared[1]) is main

    def test_installed_console_script(self):
        script = Path(sys.executable).with_name("pcnn-lightning")
        if not script.exists():
            pytest.skip("the package is not installed here")
        run = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout.strip()) == (0, f"pcnn_lightning {pcnn_lightning.__version__}"), run.stderr

    def test_help(self, command):
        run = command("fit", "--help")
        assert run.code == 0
        assert "--ckpt_path" in run.out

    def test_no_arguments(self, command):
        command().is_usage_error("fit", "test", "predict")

    def test_no_subcommand(self, command):
        command(*DIGITS).is_usage_error()

    def test_unknown_subcommand(self, command):
        command("train", *DIGITS).is_usage_error("train", "fit", "predict")

    def test_no_model(self, command):
        command("fit", *DIGITS).is_usage_error("model")

    def test_no_data(self, command):
        command("fit", *NETWORK).is_usage_error("data")

    def test_traceback_when_asked_for(self, command, monkeypatch):
        monkeypatch.setenv("PCNN_LIGHTNING_TRACEBACK", "1")
        with pytest.raises(pcnn_lightning.errors.InputError):
            command("test", *DIGITS, *TRAINING)


class TestWhatTheParserRefuses:
    @pytest.mark.parametrize(
        ("flags", "mentioned"),
        [
            (["--model.etaa=1"], ["etaa"]),
            (["--data.batchsize=1"], ["batchsize"]),
            (["--trainer.epochs=1"], ["trainer.epochs"]),
            (["--epochs=1"], ["epochs"]),
            (["--model.eta1=fast"], ["eta1", "float", "fast"]),
            (["--model.projections=1.5"], ["projections", "int", "1.5"]),
            (["--model.stages=4"], ["stages", "list"]),
            (["--model.stage=quaternary"], ["stage", "ternary", "binary", "quaternary"]),
            (["--model.schedule=linear"], ["schedule", "cosine", "linear"]),
            (["--trainer.max_epochs=ten"], ["max_epochs", "int", "ten"]),
            (["--trainer.callbacks+=StageSwitch", "--trainer.callbacks.epok=1"], ["epok"]),
            (["--trainer.callbacks+=NoSuchCallback"], ["NoSuchCallback"]),
            (["--model=NoSuchModel"], ["NoSuchModel"]),
            (["--data=NoSuchData"], ["NoSuchData"]),
            (["--data=pcnn_lightning.PCNN"], ["PCNN"]),
            (["--config=missing.yaml"], ["missing.yaml"]),
            (["--seed_everything=abc"], ["seed_everything"]),
        ],
        ids=lambda value: value[-1] if value and value[-1].startswith("--") else "",
    )
    def test_refused(self, command, flags, mentioned):
        command(*FIT, *flags).is_usage_error(*mentioned)

    @pytest.mark.parametrize("flag", ["--trainer.max_epoch=3", "--conf=x.yaml", "--ckpt=x.ckpt"])
    def test_abbreviations(self, command, flag):
        command(*FIT, flag).is_usage_error(flag.partition("=")[0])

    @pytest.mark.parametrize(
        ("text", "mentioned"),
        [
            ("model: [1, 2\n  foo: : bar", ["line 2"]),
            ("- 1\n- 2\n", []),
            ("", []),
            ("optimizer: sgd\n", ["optimizer"]),
            ("model:\n  class_path: PCNN\n  init_args:\n    etaa: 1\n", ["etaa"]),
            ("model:\n  class_path: PCNN\n  eta1: 1\n", ["eta1"]),
            ("trainer:\n  max_epochs: ten\n", ["max_epochs", "ten"]),
            ("trainer:\n  max_epoch: 3\n", ["max_epoch"]),
        ],
    )
    def test_bad_config(self, command, tmp_path, text, mentioned):
        (tmp_path / "bad.yaml").write_text(text)
        command(*FIT, "--config=bad.yaml").is_usage_error(*mentioned)

    def test_binary_file_for_config(self, command, tmp_path):
        (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00\x01")
        run = command(*FIT, "--config=bad.yaml")
        assert run.code == 2
        assert "bad.yaml" in run.err

    def test_folder_for_config(self, command):
        command(*FIT, "--config=.").is_usage_error("config")


class TestWhatClassesRefuse:
    @pytest.mark.parametrize(
        ("flag", "mentioned"),
        [
            ("--model.backbone=vgg19", ["backbone", "vgg19", "wrn22", "vgg_small"]),
            ("--model.stages=[2,2,2]", ["stages", "4", "[2, 2, 2]"]),
            ("--model.projections=0", ["projections", "at least 1", "0"]),
            ("--model.sigma=0", ["sigma", "positive", "0"]),
            ("--model.projection_loss_weight=-1", ["projection_loss_weight", "at least 0", "-1"]),
            ("--model.eta=-1", ["eta", "at least 0", "-1"]),
            ("--model.eta1=-1", ["eta1", "at least 0", "-1"]),
            ("--model.eta2=-1", ["eta2", "at least 0", "-1"]),
            ("--model.milestones=[0.6,0.3]", ["milestones", "rise", "[0.6, 0.3]"]),
            ("--model.milestones=[60,120,160]", ["milestones", "(0, 1)", "[60.0, 120.0, 160.0]"]),
            ("--model.projection_milestones=[0.6,0.3]", ["projection_milestones", "[0.6, 0.3]"]),
            ("--model.decay=0", ["decay", "(0, 1]", "0"]),
            ("--model.accumulate=0", ["accumulate", "at least 1", "0"]),
            ("--model.gradient_clip=0", ["gradient_clip", "positive", "0"]),
            ("--model.label_smoothing=1", ["label_smoothing", "[0, 1)", "1"]),
            ("--model.momentum=-1", ["momentum", "-1"]),
            ("--model.weight_decay=-1", ["weight_decay", "-1"]),
            ("--model.center_loss_weight=-1", ["center_loss_weight", "at least 0", "-1"]),
            ("--model.center_loss_alpha=2", ["center_loss_alpha", "[0, 1]", "2"]),
            ("--data.batch_size=0", ["batch_size", "1 or more", "0"]),
            ("--data.val_fraction=1", ["val_fraction", "below 1", "1"]),
            ("--data.train_size=99999", ["train_size", "at most", "99999"]),
            ("--data.image_size=0", ["image_size", "1 or more", "0"]),
            ("--model.init_from=missing.ckpt", ["missing.ckpt"]),
            ("--seed_everything=-3", ["-3"]),
        ],
    )
    def test_refused(self, command, flag, mentioned):
        command(*FIT, flag).is_refused(*mentioned)
        assert not list(Path.cwd().rglob("*.ckpt"))

    @pytest.mark.parametrize(
        ("flags", "mentioned"),
        [
            (["--trainer.gradient_clip_val=1"], ["model.gradient_clip"]),
            (["--trainer.accumulate_grad_batches=2"], ["model.accumulate"]),
            (["--trainer.max_epochs=-1"], ["max_epochs"]),
        ],
    )
    def test_trainer_settings_that_have_no_place_here(self, command, flags, mentioned):
        """The message points to where the setting belongs."""
        command(*FIT, *flags).is_refused(*mentioned)

    def test_no_such_accelerator(self, command):
        command(*FIT, "--trainer.accelerator=hpu").is_refused("hpu")

    @pytest.mark.parametrize("epoch", [1, 2])
    def test_switch_that_leaves_no_binary_epoch(self, command, epoch):
        run = command(*FIT, *SWITCH, f"--trainer.callbacks.epoch={epoch}")
        run.is_refused("StageSwitch", str(epoch), "max_epochs", "1")

    def test_switch_without_a_ternary_model(self, command):
        run = command(*FIT, *SWITCH, "--model.stage=binary", "--trainer.max_epochs=2")
        run.is_refused("StageSwitch", "ternary", "binary")

    def test_switch_of_a_full_precision_model(self, command):
        run = command(*FIT, *SWITCH, "--model.full_precision=true", "--trainer.max_epochs=2")
        run.is_refused("StageSwitch", "full_precision")

    def test_switch_at_epoch_zero(self, command):
        command(*FIT, *SWITCH, "--trainer.callbacks.epoch=0").is_refused("epoch", "positive", "0")

    def test_switch_that_watches_nothing(self, command):
        flags = ["--trainer.callbacks.patience=1", "--trainer.callbacks.monitor=val/top1", "--trainer.max_epochs=2"]
        command(*FIT, *SWITCH, *flags).is_refused("val/top1", "val/accuracy")

    def test_checkpoint_that_watches_nothing(self, command):
        command(*FIT, *KEEP, "--trainer.callbacks.monitor=val/top1").is_refused("val/top1", "val/accuracy")

    @pytest.mark.parametrize("label", [3, -1])
    def test_labels_out_of_range(self, command, label):
        data = [f"--data={__name__}.WrongLabels", f"--data.label={label}"]
        command("fit", *data, *TRAINING).is_refused("labels", "[0, 2]", str(label))


class TestFolders:
    FIT = ["fit", *TRAINING, "--data=ImageFolder", "--data.root=images", "--data.batch_size=4"]

    def test_missing(self, command):
        command(*self.FIT).is_refused("images", "images/train/<class>")

    def test_without_splits(self, command, tmp_path):
        (tmp_path / "images").mkdir()
        command(*self.FIT).is_refused("images/train/<class>")

    def test_without_classes(self, command, tmp_path):
        (tmp_path / "images" / "train").mkdir(parents=True)
        command(*self.FIT).is_refused("images/train", "class")

    @pytest.mark.parametrize("in_memory", ["true", "false"])
    def test_empty_class_folder(self, command, tmp_path, in_memory):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 0})
        command(*self.FIT, f"--data.in_memory={in_memory}").is_refused("images/train/dog", ".png")

    def test_class_missing_from_a_split(self, command, tmp_path):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
        (tmp_path / "images" / "test" / "dog").rename(tmp_path / "images" / "test" / "cow")
        command(*self.FIT).is_refused("images/test", "missing dog", "extra cow")

    @pytest.mark.parametrize(
        "flags",
        [
            ["--data.in_memory=true"],
            ["--data.in_memory=false"],
            ["--data.in_memory=false", "--data.image_size=8", "--data.num_workers=1"],
        ],
    )
    def test_corrupt_image(self, command, tmp_path, flags):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
        bad = tmp_path / "images" / "train" / "dog" / "2.png"
        bad.write_bytes(bad.read_bytes()[:60])
        command(*self.FIT, "--data.val_fraction=0", *flags).is_refused("images/train/dog/2.png", "cannot be read")

    def test_one_class(self, command, tmp_path):
        """Nothing can be told apart."""
        make_folder(tmp_path / "images", {"cat": 4})
        command(*self.FIT).is_refused("num_classes", "at least 2", "1")

    def test_no_test_images(self, command, tmp_path):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 4}, splits=("train",))
        assert command(*self.FIT, *KEEP).code == 0
        run = command("test", *self.FIT[1:], "--ckpt_path=kept/last.ckpt")
        run.is_refused("test images")

    @pytest.mark.parametrize("folder", ["nowhere", "."])
    def test_nothing_to_predict_for(self, command, tmp_path, folder):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
        (tmp_path / "empty").mkdir()
        assert command(*self.FIT, *KEEP).code == 0
        flags = [f"--data.predict_dir=empty/{folder}", "--ckpt_path=kept/last.ckpt"]
        command("predict", *self.FIT[1:], *flags).is_refused("empty")
        assert not Path("predictions.csv").exists()


class TestDivergence:
    def test_blow_up(self, command):
        run = command(*FIT, "--model.eta1=1e20", "--trainer.max_epochs=4", *KEEP)
        run.is_refused("step", "epoch 0", "eta1", "1e+20", "checkpoint", code=1)
        assert not list(Path("kept").glob("*.ckpt")), "a checkpoint of a network that is no good"

    def test_last_good_checkpoint(self, command):
        run = command(*FIT, "--trainer.max_epochs=3", *KEEP, f"--trainer.callbacks+={__name__}.Poison")
        run.is_refused("at step 2 ", "epoch 1", code=1)
        named = Path(run.err.rpartition(": ")[2].strip())
        assert named.is_file(), f"the message ends in the last good checkpoint: {run.err}"
        assert load(named)["epoch"] == 0
        for path in Path("kept").glob("*.ckpt"):
            assert all(tensor.isfinite().all() for tensor in tensors_in(load(path)) if tensor.is_floating_point())
        model = PCNN.load_from_checkpoint(named)
        assert model(torch.zeros(1, 1, 8, 8)).isfinite().all()

    def test_in_a_resumed_run(self, command):
        command(*FIT, *KEEP)
        flags = ["--ckpt_path=kept/last.ckpt", "--model.eta1=1e20", "--trainer.max_epochs=3"]
        run = command(*FIT, *KEEP, *flags)
        run.is_refused("step", "epoch 1", "kept/last.ckpt", code=1)
        checkpoints = [load(path) for path in Path("kept").glob("*.ckpt")]
        assert all(tensor.isfinite().all() for tensor in tensors_in(checkpoints) if tensor.is_floating_point())


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("kind", "subcommand", "place"),
        [
            *product(["missing", "empty", "truncated", "text", "folder", "list", "foreign"], ["test"], ["flag"]),
            *product(["missing", "truncated", "foreign"], ["fit"], ["flag"]),
            *product(["missing", "truncated", "foreign"], ["test"], ["file"]),
            ("missing", "fit", "file"),
            ("truncated", "predict", "flag"),
        ],
    )
    def test_that_is_none(self, command, tmp_path, trained, kind, subcommand, place):
        path = tmp_path / "given.ckpt"
        whole = (trained / "last.ckpt").read_bytes()
        if kind in ("empty", "truncated", "text"):
            path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"hello"}[kind])
        elif kind == "folder":
            path.mkdir()
        elif kind == "list":
            torch.save([1], path)
        elif kind == "foreign":
            trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
            trainer.strategy.connect(BoringModel())
            trainer.save_checkpoint(path)
        if place == "flag":
            run = command(subcommand, *DIGITS, *TRAINING, f"--ckpt_path={path}")
        else:
            (tmp_path / "ckpt.yaml").write_text(f"ckpt_path: {path}\n")
            run = command(subcommand, *DIGITS, *TRAINING, "--config=ckpt.yaml")
        run.is_refused("given.ckpt")
        assert not list(tmp_path.glob("checkpoints/*"))

    @pytest.mark.parametrize("subcommand", ["fit", "test"])
    def test_of_other_classes(self, command, tmp_path, trained, subcommand):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
        data = ["--data=ImageFolder", "--data.root=images"]
        run = command(subcommand, *data, *QUIET, f"--ckpt_path={trained / 'last.ckpt'}", "--model=PCNN")
        run.is_refused("net.classifier", "(10,", "(2,")

    def test_of_another_network(self, command, trained):
        run = command("test", *DIGITS, *QUIET, f"--ckpt_path={trained / 'last.ckpt'}", "--model.stages=[2,2,2,4]")
        run.is_refused("net.", "in the checkpoint", "in the model")

    @pytest.mark.parametrize(
        ("subcommand", "word"), [("fit", "last"), ("fit", "best"), ("test", "last"), ("predict", "best")]
    )
    def test_nothing_there(self, command, tmp_path, subcommand, word):
        run = command(subcommand, *DIGITS, *TRAINING, *KEEP, f"--ckpt_path={word}")
        run.is_refused(word, "kept")
        assert not list(tmp_path.rglob("*.ckpt"))

    @pytest.mark.parametrize("word", ["last", "best"])
    def test_nowhere_to_look(self, command, tmp_path, word):
        command(*FIT, f"--ckpt_path={word}").is_refused(word, "StageCheckpoint", "dirpath")
        assert not list(tmp_path.rglob("*.ckpt"))

    @pytest.mark.parametrize(
        ("subcommand", "flags"),
        [
            ("validate", []),
            ("test", []),
            ("test", ["--ckpt_path=null"]),
            ("predict", []),
            ("predict", ["--ckpt_path=null"]),
        ],
    )
    def test_not_given(self, command, subcommand, flags):
        run = command(subcommand, *DIGITS, *TRAINING, *flags)
        assert run.code == 2
        assert "ckpt_path" in run.err.rpartition("error:")[2]

    def test_last(self, command, trained):
        run = command("test", *DIGITS, *TRAINING, *in_folder(trained), "--ckpt_path=last")
        assert run.code == 0, run.err
        assert Path(str(run.cli.trainer.ckpt_path)) == trained / "last.ckpt"

    def test_best_is_binary(self, command, trained):
        run = command("test", *DIGITS, *TRAINING, *in_folder(trained), "--ckpt_path", "best")
        assert run.code == 0, run.err
        assert Path(str(run.cli.trainer.ckpt_path)) == trained / "binary.ckpt"
        assert load(trained / "binary.ckpt")["one_bit"]["stage"] == run.cli.model.stage == "binary"
        assert load(trained / "ternary.ckpt")["one_bit"]["stage"] == "ternary"

    def test_last_of_a_second_run_is_the_newest(self, command):
        command(*FIT, *KEEP)
        command(*FIT, *KEEP, "--model.eta1=0.01")
        os.utime("kept/last.ckpt", (time.time() - 60,) * 2)
        run = command("test", *DIGITS, *TRAINING, *KEEP, "--ckpt_path=last")
        assert load(run.cli.trainer.ckpt_path)["hyper_parameters"]["eta1"] == 0.01

    def test_best_when_its_file_is_gone(self, command):
        command(*FIT, *KEEP)
        Path("kept/binary.ckpt").unlink()
        run = command("test", *DIGITS, *TRAINING, *KEEP, "--ckpt_path=best")
        run.is_refused("--ckpt_path best: ", "kept/stages.json names binary.ckpt, which is gone")

    def test_broken_record(self, command):
        command(*FIT, *KEEP)
        Path("kept/stages.json").write_text('{"binary": ')
        command("test", *DIGITS, *TRAINING, *KEEP, "--ckpt_path=best").is_refused("stages.json")

    def test_resume_last(self, command):
        constant = [*FIT, *SWITCH, "--model.schedule=constant"]  # others depend on the length of the run
        progressive = [*constant, *KEEP]
        whole = command(*constant, "--trainer.max_epochs=3")
        command(*progressive, "--trainer.max_epochs=2")
        run = command(*progressive, "--trainer.max_epochs=3", "--ckpt_path=last")
        assert run.code == 0, run.err
        assert run.cli.trainer.global_step == 6
        assert same_weights(run.cli.model, whole.cli.model)

    def test_runs_do_not_overwrite_each_other(self, command):
        command(*FIT, *KEEP)
        first = {path: hashlib.sha256(path.read_bytes()).digest() for path in Path("kept").glob("*.ckpt")}
        assert {path.name for path in first} == {"binary.ckpt", "last.ckpt"}
        assert command(*FIT, *KEEP, "--model.eta1=0.01").code == 0
        for path, digest in first.items():
            assert hashlib.sha256(path.read_bytes()).digest() == digest, f"{path} has changed"
        assert len(list(Path("kept").glob("*.ckpt"))) == 4


class TestPrecedence:
    def test_flag_over_checkpoint(self, command, trained):
        flags = [f"--ckpt_path={trained / 'last.ckpt'}", "--model.init_args.eta1=0.03", "--model.schedule=constant"]
        run = command("fit", *DIGITS, *QUIET, *flags, "--trainer.max_epochs=3")
        assert run.code == 0, run.err
        hparams = run.cli.model.hparams
        assert (hparams.eta1, hparams.schedule) == (0.03, "constant"), "as the flags say"
        assert (hparams.eta2, hparams.stages, hparams.projections) == (0.01, [2, 2, 2, 2], 2), "as it was trained"
        assert [group["lr"] for group in run.cli.trainer.optimizers[0].param_groups] == [0.03, 0.01]
        assert run.cli.trainer.global_step == 6, "an epoch of two batches was added to two"

    def test_short_flag_and_class_name(self, command, trained):
        """Naming the class again does not set the rest back to its defaults."""
        flags = [f"--ckpt_path={trained / 'last.ckpt'}", "--model=PCNN", "--model.eta1=0.03"]
        run = command("fit", *DIGITS, *QUIET, *flags, "--trainer.max_epochs=3")
        assert (run.cli.model.hparams.eta1, run.cli.model.hparams.stages) == (0.03, [2, 2, 2, 2])

    def test_file_over_checkpoint_and_flag_over_file(self, command, tmp_path, trained):
        model = {"class_path": "PCNN", "init_args": {"eta1": 0.03, "eta2": 0.02}}
        (tmp_path / "new.yaml").write_text(yaml.safe_dump({"model": model}))
        flags = ["--config=new.yaml", "--model.eta2=0.001", f"--ckpt_path={trained / 'last.ckpt'}"]
        run = command("fit", *DIGITS, *QUIET, *flags, "--trainer.max_epochs=3")
        hparams = run.cli.model.hparams
        assert (hparams.eta1, hparams.eta2, hparams.backbone, hparams.projections) == (0.03, 0.001, "wrn7", 2)

    def test_momentum_and_decay_too(self, command, trained):
        """Settings that an optimizer brings back with its state."""
        flags = [f"--ckpt_path={trained / 'last.ckpt'}", "--model.momentum=0.5", "--model.weight_decay=0.01"]
        run = command("fit", *DIGITS, *QUIET, *flags, "--trainer.max_epochs=3")
        groups = run.cli.trainer.optimizers[0].param_groups
        assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.5, 0.01), (0.5, 0.0)]

    @pytest.mark.parametrize("equals", [True, False])
    def test_architecture_comes_from_the_checkpoint(self, command, trained, equals):
        path = str(trained / "last.ckpt")
        run = command("test", *DIGITS, *QUIET, *([f"--ckpt_path={path}"] if equals else ["--ckpt_path", path]))
        assert run.code == 0, run.err
        assert "test/accuracy" in run.out
        assert same_weights(PCNN.load_from_checkpoint(path), run.cli.model)
        assert run.cli.model.stage == "binary"

    def test_config_before_the_subcommand(self, command, tmp_path, trained):
        (tmp_path / "all.yaml").write_text(yaml.safe_dump({"test": {"data": {"class_path": "Digits"}}}))
        run = command("--config=all.yaml", "test", *QUIET, f"--ckpt_path={trained / 'last.ckpt'}")
        assert run.code == 0, run.err.rpartition("error:")[2]

    def test_shape_comes_from_the_data(self, command, tmp_path):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 4, "cow": 4})
        run = command("fit", "--data=ImageFolder", "--data.root=images", "--data.batch_size=4", *TRAINING)
        assert run.code == 0, run.err
        assert (run.cli.model.hparams.num_classes, run.cli.model.hparams.in_channels) == (3, 3)
        run = command(*FIT)
        assert (run.cli.model.hparams.num_classes, run.cli.model.hparams.in_channels) == (10, 1)

    @pytest.mark.parametrize(
        ("place", "name"),
        [("model.", "num_classes"), ("model.init_args.", "in_channels"), ("config", "num_classes")],
    )
    def test_shape_given_by_hand(self, command, tmp_path, place, name):
        if place == "config":
            model = {"class_path": "PCNN", "init_args": {name: 7}}
            (tmp_path / "shape.yaml").write_text(yaml.safe_dump({"model": model}))
            run = command(*FIT, "--config=shape.yaml")
        else:
            run = command(*FIT, f"--{place}{name}=7")
        assert run.code == 2, f"{name}: 7 was passed over in silence"
        assert name in run.err.rpartition("error:")[2]


class TestPredict:
    def test_digits(self, command, trained):
        path = trained / "last.ckpt"
        run = command("predict", *DIGITS, *QUIET, f"--ckpt_path={path}", "--output=new/folder/out.csv")
        assert run.code == 0, run.err
        assert "360" in run.out
        assert "new/folder/out.csv" in run.out
        with Path("new/folder/out.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["image", "label", "probability"]
        assert [row[0] for row in rows] == [str(number) for number in range(360)]
        data, model = Digits(image_size=8), PCNN.load_from_checkpoint(path).eval()
        images = data.on_after_batch_transfer(data.predict_set.__getitems__(list(range(360))), 0)
        with torch.no_grad():
            expected, labels = model(images).softmax(1).max(1)
        assert [row[1] for row in rows] == [data.classes[label] for label in labels]
        found = torch.tensor([float(row[2]) for row in rows])
        assert (found > 0).all()
        assert (found <= 1).all()
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)

    def test_default_output(self, command, trained):
        assert command("predict", *DIGITS, *QUIET, f"--ckpt_path={trained / 'last.ckpt'}").code == 0
        assert len(Path("predictions.csv").read_text().splitlines()) == 361

    def test_folder(self, command, tmp_path):
        images = make_folder(tmp_path / "images", {"cät": 4, "dog, small": 4})
        data = ["--data=ImageFolder", "--data.root=images", "--data.batch_size=3"]
        assert command("fit", *data, *TRAINING, *KEEP).code == 0
        wanted = tmp_path / "wanted"
        (wanted / "deep").mkdir(parents=True)
        (images / "test" / "cät" / "0.png").rename(wanted / "deep" / "b.png")
        (images / "test" / "cät" / "1.png").rename(wanted / "a, b.png")
        (wanted / "notes.txt").write_text("no image")
        run = command("predict", *data, *QUIET, "--data.predict_dir=wanted", "--ckpt_path=kept/last.ckpt")
        assert run.code == 0, run.err
        with Path("predictions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["image"] for row in rows] == ["a, b.png", "deep/b.png"]
        assert {row["label"] for row in rows} <= {"cät", "dog, small"}
        assert command("predict", *data, *QUIET, "--ckpt_path=kept/last.ckpt", "--output=test.csv").code == 0
        with Path("test.csv").open(newline="", encoding="utf-8") as file:
            names = [row["image"] for row in csv.DictReader(file)]
        assert names == ImageFolder("images").predict_names()
        assert names[0] == "cät/2.png"

    @pytest.mark.parametrize("output", ["taken/out.csv", "folder"])
    def test_output_that_cannot_be_written(self, command, tmp_path, trained, output):
        (tmp_path / "taken").write_text("a file")
        (tmp_path / "folder").mkdir()
        run = command("predict", *DIGITS, *QUIET, f"--ckpt_path={trained / 'last.ckpt'}", f"--output={output}")
        run.is_refused(output)


class TestConfigs:
    def test_print_config(self, command):
        run = command(*FIT, "--model.eta1=0.03", "--print_config")
        assert run.code == 0
        config = yaml.safe_load(run.out)
        assert config["model"]["class_path"] == "pcnn_lightning.PCNN"
        assert config["model"]["init_args"]["eta1"] == 0.03
        assert config["trainer"]["max_epochs"] == 1
        assert config["seed_everything"] == 0

    def test_printed_config_can_be_run(self, command, tmp_path):
        (tmp_path / "run.yaml").write_text(command(*FIT, "--print_config").out)
        assert same_weights(command("fit", "--config=run.yaml").cli.model, command(*FIT).cli.model)

    def test_saved_config_reproduces_the_run(self, command):
        logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.name=x"]
        arguments = [*FIT, *logger, *SWITCH, *KEEP, "--trainer.max_epochs=2", "--seed_everything=3"]
        first = command(*arguments)
        assert first.code == 0, first.err
        again = command("fit", "--config=runs/x/version_0/config.yaml")
        assert again.code == 0, again.err
        assert Path("runs/x/version_1/config.yaml").is_file()
        assert again.cli.model is not first.cli.model
        assert same_weights(first.cli.model, again.cli.model)
        other = command(*arguments, "--seed_everything=4")
        assert not same_weights(first.cli.model, other.cli.model), "the seed matters, so this test can fail"

    def test_saved_config_of_a_resumed_run(self, command, trained):
        """It holds what came from the checkpoint too."""
        logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.name=x"]
        flags = [
            f"--ckpt_path={trained / 'last.ckpt'}",
            "--trainer.max_epochs=3",
            "--trainer.enable_progress_bar=false",
        ]
        first = command("fit", *DIGITS, "--trainer.accelerator=cpu", *logger, *flags)
        assert first.code == 0, first.err
        again = command("fit", "--config=runs/x/version_0/config.yaml")
        assert again.code == 0, again.err
        assert same_weights(first.cli.model, again.cli.model)

    def test_config_in_the_working_folder_stays_as_it_was(self, command, tmp_path):
        """Without a logger there is no folder of the run's own to save the whole configuration to."""
        mine = tmp_path / "config.yaml"
        mine.write_text("# mine\nmodel:\n  class_path: PCNN\n  init_args:\n    eta1: 0.03\n")
        before = mine.read_text()
        assert command(*FIT, "--config=config.yaml").code == 0
        assert mine.read_text() == before

    def test_debug_leaves_no_files(self, command, tmp_path):
        """Least of all a last.ckpt, which a later ``--ckpt_path last`` would take."""
        run = command(*FIT, *KEEP, f"--config={ROOT / 'configs' / 'debug.yaml'}")
        assert run.code == 0, run.err
        assert run.cli.trainer.global_step == 1
        assert not list(tmp_path.rglob("*.ckpt"))


# What a network costs.


def test_summary_in_three_formats(command):
    table, csv_text, json_text = (
        command("summary", *DIGITS, *NETWORK, *QUIET, f"--format={form}").out for form in ("table", "csv", "json")
    )
    assert "full-precision twin" in table
    total = json.loads(json_text)["total"]
    assert json.loads(json_text)["image_shape"] == [1, 8, 8]
    *_, last = csv.DictReader(csv_text.splitlines())
    assert {name: str(value) for name, value in total.items() if isinstance(value, int)}.items() <= last.items()
    # Stage 1 to 3 of 4 channels: three 3×3 convolutions of 4×4 kernels each.
    assert total["parameters_1bit"] == 3 * 4 * 4 * 9
    assert f"{total['parameters_1bit']:,}" in table


def test_fit_prints_the_summary_of_the_stage_it_starts_in_unless_told_not_to(command):
    arguments = [argument for argument in FIT if argument != "--trainer.enable_model_summary=false"]
    assert "Compression: " in command(*arguments, "--model.stage=ternary", "--trainer.limit_train_batches=1").out
    assert "Compression: " not in command(*FIT, "--trainer.limit_train_batches=1").out


def test_summary_of_data_that_do_not_say_their_size(command):
    run = command("summary", "--data=test_cli.WrongLabels", "--data.label=0", *NETWORK, *QUIET)
    run.is_refused("WrongLabels has no image_shape")


def test_an_unknown_summary_format(command):
    command("summary", *DIGITS, *NETWORK, *QUIET, "--format=html").is_usage_error("format", "html")


# Packed files and exporters.


class OtherDigits(Digits):
    """Digits normalised otherwise."""

    mean = (0.5,)


@pytest.fixture(scope="module")
def packed(trained):
    """A packed file of the trained binary network, of 8×8 images."""
    path = trained / "digits.safetensors"
    main(["export", *DIGITS, *QUIET, f"--ckpt_path={trained}/last.ckpt", f"--output={path}"])
    return path


def test_a_packed_file_is_tested_and_predicts_as_the_checkpoint_it_is_of(command, trained, packed):
    tested, rows = [], []
    for path in (trained / "last.ckpt", packed):
        run = command("test", *DIGITS, *QUIET, f"--ckpt_path={path}")
        assert run.code == 0, run.err
        tested.append(run.cli.trainer.callback_metrics)
        assert command("predict", *DIGITS, *QUIET, "--ckpt_path", path, "--output=p.csv").code == 0
        rows.append(Path("p.csv").read_text())
    checkpoint, file = tested
    assert set(checkpoint) == set(file) >= {"test/loss", "test/accuracy"}
    for name in ("test/accuracy", "test/cross_entropy"):
        assert torch.equal(checkpoint[name], file[name])
    assert torch.equal(file["test/loss"], file["test/cross_entropy"])
    assert rows[0] == rows[1]
    assert len(rows[0].splitlines()) == 361
    assert {"val/loss", "val/accuracy"} <= set(
        command("validate", *DIGITS, *QUIET, f"--ckpt_path={packed}").cli.trainer.callback_metrics
    )


def test_a_packed_file_is_the_network_whatever_model_the_configuration_names(command, packed):
    model = ["--model=MCN", "--model.planes=3", "--model.eta1=0.5"]
    run = command("test", f"--ckpt_path={packed}", *DIGITS, *QUIET, "--config", ROOT / "configs/digits.yaml", *model)
    assert run.code == 0, run.err
    assert run.cli.model.net.description.stages == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("data", "mentioned"),
    [
        ([*DIGITS, "--data.image_size=12"], ["image_shape (1, 8, 8)", "(1, 12, 12)"]),
        ([*DIGITS, "--data=test_cli.OtherDigits"], ["mean (0.3049,)", "(0.5,)"]),
        (["--data=test_cli.WrongLabels", "--data.label=0"], ["num_classes 10", "3"]),
    ],
    ids=["size", "mean", "classes"],
)
def test_a_packed_file_on_data_of_another_kind_is_refused(command, packed, data, mentioned):
    command("test", *data, *QUIET, f"--ckpt_path={packed}").is_refused(str(packed), *mentioned)


@pytest.mark.parametrize("flag", ["--ckpt_path", "--model.init_from"])
def test_a_packed_file_is_not_trained_on(command, packed, flag):
    command(*FIT, f"{flag}={packed}").is_refused(str(packed), "packed", "cannot be trained")
    Path("network.yaml").write_text(f"ckpt_path: {packed}")
    command("test", *DIGITS, *TRAINING, "--config=network.yaml").is_refused(str(packed), "the flag --ckpt_path")


def test_a_damaged_packed_file_is_refused(command, packed):
    Path("bad.safetensors").write_bytes(packed.read_bytes()[:-1])
    command("test", *DIGITS, *QUIET, "--ckpt_path=bad.safetensors").is_refused("bad.safetensors", "damaged")


def test_export_of_each_stage(command, trained):
    for stage in ("ternary", "binary"):
        (path,) = trained.glob(f"{stage}*.ckpt")
        run = command("export", *DIGITS, *QUIET, f"--ckpt_path={path}")
        network = load_packed("network.safetensors")
        assert run.out.strip() == f"network.safetensors: {Path('network.safetensors').stat().st_size:,} bytes"
        assert network.description.stage == stage
        assert network.description.class_names == tuple("0123456789")
        assert all(
            torch.equal(network.state_dict()[name], value)
            for name, value in freeze(PCNN.load_from_checkpoint(path).net).state_dict().items()
        )


def test_export_by_name_and_on_from_a_packed_file(command, trained, packed):
    run = command("export", *DIGITS, *TRAINING, *in_folder(trained), "--ckpt_path=last", "--output=a/b.safetensors")
    assert run.code == 0, run.err
    assert Path("a/b.safetensors").read_bytes() == packed.read_bytes()
    run = command("export", *DIGITS, *QUIET, f"--ckpt_path={packed}", "--format=torch")
    assert run.code == 0, run.err
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    logits = torch.export.load("network.pt2").module()(images)
    assert torch.equal(logits.argmax(1), load_packed(packed).classify(images))


def test_what_export_refuses(command, trained, monkeypatch):
    export = ["export", *DIGITS, *QUIET, f"--ckpt_path={trained}/last.ckpt"]
    command("export", *DIGITS, *TRAINING).is_refused("export needs trained weights", "--ckpt_path")
    command(*export, "--format=tflite").is_usage_error("format", "packed", "onnx", "torch", "tflite")
    Path("folder").mkdir()
    command(*export, "--output=folder").is_refused("folder cannot be written", "Is a directory")
    command(*export, "--data=test_cli.WrongLabels", "--data.label=0").is_refused("classifier", "(10,)", "(3,)")
    three = ["--data=test_cli.WrongLabels", "--data.label=0", *TRAINING]
    assert command("fit", *three, *KEEP).code == 0
    command("export", *three, "--ckpt_path=kept/last.ckpt").is_refused("WrongLabels has no image_shape")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    command(*export, "--format=onnx").is_refused("onnxscript", ".[onnx]")
    assert [path.name for path in Path().iterdir() if path.suffix in (".safetensors", ".onnx")] == []


# Interrupted runs.


class Signal(Callback):
    """Sends the process a signal in the middle of a run."""

    def __init__(self, name: str, batch: int = 3) -> None:
        self.number, self.batch = signal.Signals[name], batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_that_is_ended_says_so_and_goes_on_where_it_was(command, name, status):
    whole = command(*FIT, *KEEP, "--trainer.max_epochs=3").cli.model.state_dict()
    shutil.rmtree("kept")
    arguments = [*FIT, *KEEP, "--trainer.max_epochs=3"]
    before = signal.getsignal(signal.SIGINT)
    ended = command(*arguments, "--trainer.callbacks+=test_cli.Signal", f"--trainer.callbacks.name={name}")
    assert ended.code == status
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 4
    resumed = command(*arguments, "--ckpt_path=last")
    assert resumed.code == 0
    for key, value in resumed.cli.model.state_dict().items():
        assert torch.equal(value, whole[key]), key


def test_nothing_left_to_train_is_said(command):
    arguments = [*FIT, *KEEP]
    command(*arguments)
    again = command(*arguments, "--ckpt_path=last")
    again.is_refused("last.ckpt has trained for 1 epochs already", "max_epochs")


def test_kill_9_during_a_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """The process dies with half of the new file written."""
    monkeypatch.chdir(tmp_path)
    program = """
import os, sys, torch
from pcnn_lightning.checkpoints import AtomicCheckpointIO
io = AtomicCheckpointIO()
io.save_checkpoint({"weights": torch.zeros(1000)}, "last.ckpt")
def half(self, place):
    with open(self, "ab") as file:
        file.truncate(500)
    os.kill(os.getpid(), 9)
type(__import__("pathlib").Path()).replace = half
io.save_checkpoint({"weights": torch.ones(1000)}, "last.ckpt")
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert not torch.load("last.ckpt", weights_only=True)["weights"].any()
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, "last.ckpt")
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(command, monkeypatch):
    command(*FIT, *KEEP)
    before = Path("kept/last.ckpt").read_bytes()
    part = Path("kept/last.ckpt.part")
    part.symlink_to("/dev/full")
    run = command(*FIT, *KEEP, "--trainer.max_epochs=2", "--ckpt_path=last")
    run.is_refused("kept/last.ckpt cannot be written", "No space left on device")
    assert Path("kept/last.ckpt").read_bytes() == before


def test_a_log_folder_that_cannot_be_written(command):
    Path("logs").write_text("a file is in its place")
    flags = [flag for flag in FIT if flag != "--trainer.logger=false"]
    run = command(*flags, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs")
    run.is_refused("logs")


# Finished runs.


def test_compare_prints_a_table_and_draws(command):
    flags = [flag for flag in FIT if flag != "--trainer.logger=false"]
    for weight in (0, 0.001):
        command(
            *flags,
            "--trainer.logger=TensorBoardLogger",
            f"--trainer.logger.save_dir=logs/{weight}",
            f"--model.projection_loss_weight={weight}",
        )
    run = command("compare", "logs/0", "logs/0.001", "--output=both.png")
    assert run.code == 0
    assert "projection_loss_weight=0 " in run.out
    assert Image.open("both.png").size[0] > 300
    command("compare", "logs/0", "logs/elsewhere").is_refused("logs/elsewhere: there is no such folder")
    command("compare").is_usage_error("RUN")


@pytest.mark.parametrize("family", [["--model.stage=ternary", "--trainer.callbacks+=StageSwitch"], ["--model=MCN"]])
def test_the_same_seed_gives_the_same_bits_with_any_number_of_workers(command, family):
    switch = ["--trainer.callbacks.epoch=1"] if "--model=MCN" not in family else ["--model.levels=3"]
    flags = [*FIT, *family, *switch, "--trainer.max_epochs=2", "--trainer.deterministic=true"]
    ends = [
        command(*flags, f"--data.num_workers={workers}", f"--seed_everything={seed}").cli.model.state_dict()
        for seed, workers in ((1, 0), (1, 2), (2, 0))
    ]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert not all(torch.equal(ends[0][name], value) for name, value in ends[2].items())


def test_an_evaluation_that_is_ended_leaves_no_checkpoint(command):
    command(*FIT, *KEEP)
    before = {file.name: file.read_bytes() for file in Path("kept").iterdir()}
    ended = command("test", *DIGITS, *TRAINING, *KEEP, "--ckpt_path=last", "--trainer.callbacks+=test_cli.SignalInTest")
    assert ended.code == 143
    assert {file.name: file.read_bytes() for file in Path("kept").iterdir()} == before


class SignalInTest(Callback):
    """Sends SIGTERM in the first batch of a test."""

    def on_test_batch_start(self, *_: object) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_workers_too_and_still_leaves_a_checkpoint(tmp_path):
    """A terminal sends it to the whole process group."""
    config = ROOT / "configs" / "digits.yaml"
    command = [sys.executable, "-m", "pcnn_lightning", "fit", f"--config={config}", "--data.init_args.num_workers=2"]
    command += ["--trainer.enable_progress_bar=false"]
    with Path(tmp_path, "out").open("w") as out:
        run = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=out, stderr=out)
        last = tmp_path / "runs/digits/checkpoints/last.ckpt"
        end = time.monotonic() + 120
        while not last.exists() and time.monotonic() < end:
            time.sleep(0.5)
        os.killpg(run.pid, signal.SIGINT)
        status = run.wait(60)
    said = Path(tmp_path, "out").read_text()
    assert status == 130, said
    assert said.count("Ending after this batch") == 1
    assert "Traceback" not in said
    assert torch.load(last, weights_only=True)["global_step"] > 0


class FirstStep(Callback):
    """Where a run begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step


def test_a_requeued_run_that_lightning_resumes_by_itself_ends_well(command, monkeypatch):
    command(*FIT, *KEEP)
    Path("kept/last.ckpt").rename("hpc_ckpt_1.ckpt")
    # On SLURM, which it knows by these, Lightning looks for such a file in default_root_dir by itself.
    for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("NTASKS_PER_NODE", "NNODES"):  # of a job that runs the tests
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    flags = ["--trainer.devices=1", "--trainer.callbacks+=test_cli.FirstStep"]
    run = command(*FIT, "--trainer.max_epochs=2", "--trainer.default_root_dir=.", *flags)
    assert run.code == 0, run.err
    assert Path(str(run.cli.trainer.ckpt_path)).name == "hpc_ckpt_1.ckpt"
    assert [callback.step for callback in run.cli.trainer.callbacks if isinstance(callback, FirstStep)] == [2]
    assert run.cli.trainer.global_step == 4


# Odd circumstances.


class Vanish(Callback):
    """Takes the folder of the logs away in the middle of a run."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and Path(trainer.log_dir).exists():
            shutil.rmtree(trainer.log_dir)


def test_a_log_folder_that_vanishes_is_said_and_leaves_the_last_checkpoint(command):
    flags = [flag for flag in FIT if flag != "--trainer.logger=false"]
    flags += [*KEEP, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs"]
    flags += ["--trainer.callbacks+=LossCurves", "--trainer.callbacks+=test_cli.Vanish", "--trainer.max_epochs=3"]
    run = command(*flags)
    run.is_refused("logs")
    assert Path("kept/last.ckpt").is_file()


def test_batches_of_one_image(command):
    run = command(*FIT, "--data.batch_size=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2")
    assert run.code == 0, run.err
    assert run.cli.trainer.global_step == 3


def test_a_checkpoint_of_the_other_family_is_refused_by_name(command):
    command(*FIT, *KEEP)
    mcn = ["--model=MCN", "--model.backbone=mcn8", "--model.stages=[2,2,2,2]"]
    command("fit", *DIGITS, *mcn, *QUIET, *KEEP, "--ckpt_path=last").is_refused("holds a PCNN, not a MCN")


def test_of_two_checkpoints_the_last_is_taken(command, trained, packed):
    flags = [f"--ckpt_path={packed}", f"--ckpt_path={trained / 'last.ckpt'}"]
    assert type(command("test", *DIGITS, *QUIET, *flags).cli.model) is PCNN
    assert type(command("test", *DIGITS, *QUIET, *flags[::-1]).cli.model) is not PCNN


def test_a_subclass_is_tested_from_its_checkpoint_and_leaves(command, trained):
    class_path = f"--model.class_path={__name__}.MyPCNN"
    run = command("test", *DIGITS, *QUIET, class_path, f"--ckpt_path={trained / 'last.ckpt'}")
    assert type(run.cli.model).__name__ == "MyPCNN"
    command("export", *DIGITS, *QUIET, class_path, f"--ckpt_path={trained / 'last.ckpt'}", "--output=my.safetensors")
    assert load_packed("my.safetensors").description.family == "PCNN"


class MyPCNN(PCNN):
    """As a user may have one."""


def test_classes_of_other_names_are_refused(packed, monkeypatch, command):
    monkeypatch.setattr(Digits, "classes", [*"abcdefghij"])
    command("predict", *DIGITS, *QUIET, f"--ckpt_path={packed}").is_refused(str(packed), "classes", "'a'", "'0'")


class NoNames(LightningDataModule):
    """As a user may have one, who has not read far."""


def test_data_that_do_not_say_what_a_model_has_to_be_told(command):
    command("fit", f"--data={__name__}.NoNames", "--model=PCNN", *QUIET).is_refused("NoNames has no num_classes")
