"""``--ckpt_path``: finding checkpoints, and which settings win."""

import os
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from cli_helpers import DIGITS, FIT, KEEP, QUIET, SWITCH, TRAINING, in_folder, load, make_folder, same_weights
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from pcnn_lightning import PCNN
from pcnn_lightning.deploy import load_packed


def contents_of(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.name.endswith((".ckpt", ".json"))}


class MyPCNN(PCNN):
    """A user's subclass."""


MY_PACKAGE = """
from pcnn_lightning import PCNN


class MyPCNN(PCNN):
    def __init__(self, extra: int = 1, *, more: str, **others) -> None:
        super().__init__(**others)
        self.given = (extra, more)
"""


def test_a_subclass_with_its_own_arguments_is_loaded_by_the_checkpoint_alone(command, tmp_path, monkeypatch):
    """The module lies in the folder in which the command is given."""
    (tmp_path / "my_package.py").write_text(MY_PACKAGE)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # as the installed script has it
    own = ["--model.extra=3", "--model.more=text", "--model.widths=[2,2,2,2]", "--model.backbone=wrn7"]
    assert command("fit", *DIGITS, "--model=my_package.MyPCNN", *own, *QUIET, "--trainer.max_epochs=1").code == 0
    run = command("test", *DIGITS, *QUIET, "--ckpt_path=runs/default/version_0/checkpoints/last.ckpt")
    assert run.code == 0, run.err
    assert (type(run.cli.model).__name__, run.cli.model.given) == ("MyPCNN", (3, "text"))


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
    def test_invalid_checkpoint(self, command, tmp_path, trained, kind, subcommand, place):
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

    @pytest.mark.parametrize(
        ("subcommand", "mentioned"),
        [("fit", ["net.classifier", "(10,", "(2,"]), ("test", ["of the classes 0, 1, 2,", "extra cat, dog"])],
    )
    def test_of_other_classes(self, command, tmp_path, trained, subcommand, mentioned):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
        data = ["--data=ImageFolder", "--data.root=images"]
        run = command(subcommand, *data, *QUIET, f"--ckpt_path={trained / 'last.ckpt'}", "--model=PCNN")
        run.is_refused(*mentioned)

    def test_of_another_network(self, command, trained):
        run = command("test", *DIGITS, *QUIET, f"--ckpt_path={trained / 'last.ckpt'}", "--model.widths=[2,2,2,4]")
        run.is_refused("net.", "in the checkpoint", "in the model")

    @pytest.mark.parametrize(
        ("subcommand", "word"), [("fit", "last"), ("fit", "best"), ("test", "last"), ("predict", "best")]
    )
    def test_no_checkpoint_yet(self, command, tmp_path, subcommand, word):
        run = command(subcommand, *DIGITS, *TRAINING, *KEEP, f"--ckpt_path={word}")
        run.is_refused(word, "kept")
        assert not list(tmp_path.rglob("*.ckpt"))

    @pytest.mark.parametrize("word", ["last", "best"])
    def test_no_checkpoint_folder(self, command, tmp_path, word):
        command(*FIT, "--checkpoint=null", f"--ckpt_path={word}").is_refused(word, "checkpoint is null")
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

    @pytest.mark.parametrize("word", ["last", "best"])
    def test_of_the_newest_run_that_has_one(self, command, word):
        command(*FIT)
        command(*FIT, "--model.eta1=0.01")
        os.utime("runs/default/version_0/checkpoints/last.ckpt", (time.time() + 60,) * 2)
        Path("runs/default/version_2/checkpoints").mkdir(parents=True)  # of a run that ended before its first epoch
        run = command("test", *DIGITS, *TRAINING, f"--ckpt_path={word}")
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
        command(*FIT)
        first = contents_of("runs")
        assert {path.name for path in first} == {"binary.ckpt", "last.ckpt", "stages.json"}
        assert command(*FIT, "--model.eta1=0.01").code == 0
        assert {path: content for path, content in contents_of("runs").items() if path in first} == first
        assert len(contents_of("runs")) == 6

    def test_a_folder_of_another_run_is_refused(self, command):
        command(*FIT, *KEEP)
        first = contents_of("kept")
        command(*FIT, *KEEP).is_refused("kept holds the checkpoints of another run", "dirpath", "ckpt_path")
        assert contents_of("kept") == first


class TestPrecedence:
    def test_flag_over_checkpoint(self, command, trained):
        flags = [f"--ckpt_path={trained / 'last.ckpt'}", "--model.init_args.eta1=0.03", "--model.schedule=constant"]
        run = command("fit", *DIGITS, *QUIET, *flags, "--trainer.max_epochs=3")
        assert run.code == 0, run.err
        hparams = run.cli.model.hparams
        assert (hparams.eta1, hparams.schedule) == (0.03, "constant"), "as the flags say"
        assert (hparams.eta2, hparams.widths, hparams.projections) == (0.01, [2, 2, 2, 2], 2), "as it was trained"
        assert [group["lr"] for group in run.cli.trainer.optimizers[0].param_groups] == [0.03, 0.01, 0.03]
        assert run.cli.trainer.global_step == 6, "an epoch of two batches was added to two"

    def test_short_flag_and_class_name(self, command, trained):
        """Naming the class again does not set the rest back to its defaults."""
        flags = [f"--ckpt_path={trained / 'last.ckpt'}", "--model=PCNN", "--model.eta1=0.03"]
        run = command("fit", *DIGITS, *QUIET, *flags, "--trainer.max_epochs=3")
        assert (run.cli.model.hparams.eta1, run.cli.model.hparams.widths) == (0.03, [2, 2, 2, 2])

    def test_file_over_checkpoint_and_flag_over_file(self, command, tmp_path, trained):
        model = {"class_path": "PCNN", "init_args": {"eta1": 0.03, "eta2": 0.02}}
        (tmp_path / "new.yaml").write_text(yaml.safe_dump({"model": model}))
        flags = ["--config=new.yaml", "--model.eta2=0.001", f"--ckpt_path={trained / 'last.ckpt'}"]
        run = command("fit", *DIGITS, *QUIET, *flags, "--trainer.max_epochs=3")
        hparams = run.cli.model.hparams
        assert (hparams.eta1, hparams.eta2, hparams.backbone, hparams.projections) == (0.03, 0.001, "wrn7", 2)

    def test_momentum_and_decay_too(self, command, trained):
        """Settings that are also part of the optimizer's state."""
        flags = [f"--ckpt_path={trained / 'last.ckpt'}", "--model.momentum=0.5", "--model.weight_decay=0.01"]
        run = command("fit", *DIGITS, *QUIET, *flags, "--trainer.max_epochs=3")
        groups = run.cli.trainer.optimizers[0].param_groups
        assert [(group["momentum"], group["weight_decay"]) for group in groups] == [
            (0.5, 0.01),
            (0.5, 0.0),
            (0.5, 0.01),
        ]

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
        assert run.code == 2, f"{name}: 7 was silently ignored"
        assert name in run.err.rpartition("error:")[2]


def test_nothing_left_to_train(command):
    arguments = [*FIT, *KEEP]
    command(*arguments)
    first = contents_of("kept")
    again = command(*arguments, "--ckpt_path=last")
    assert again.code == 0
    assert "best val/accuracy" in again.out
    assert "last.ckpt has trained for 1 epochs already" in again.err
    assert contents_of("kept") == first


def test_a_checkpoint_of_the_other_family_is_refused(command):
    command(*FIT, *KEEP)
    mcn = ["--model=MCN", "--model.backbone=mcn8", "--model.widths=[2,2,2,2]"]
    command("fit", *DIGITS, *mcn, *QUIET, *KEEP, "--ckpt_path=last").is_refused("holds a PCNN, not a MCN")


def test_the_last_of_two_ckpt_path_flags_wins(command, trained, packed):
    flags = [f"--ckpt_path={packed}", f"--ckpt_path={trained / 'last.ckpt'}"]
    assert type(command("test", *DIGITS, *QUIET, *flags).cli.model) is PCNN
    assert type(command("test", *DIGITS, *QUIET, *flags[::-1]).cli.model) is not PCNN


def test_a_subclass_is_tested_and_exported(command, trained):
    class_path = f"--model.class_path={__name__}.MyPCNN"
    run = command("test", *DIGITS, *QUIET, class_path, f"--ckpt_path={trained / 'last.ckpt'}")
    assert type(run.cli.model).__name__ == "MyPCNN"
    command("export", *DIGITS, *QUIET, class_path, f"--ckpt_path={trained / 'last.ckpt'}", "--output=my.safetensors")
    assert load_packed("my.safetensors").description.family == "PCNN"
