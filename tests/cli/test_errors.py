"""Wrong input ends in a message, never in a traceback."""

import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import FIT, KEEP, QUIET, SWITCH, TRAINING, load, make_folder, tensors_in
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from pcnn_lightning import PCNN


class Poison(Callback):
    """Fill a parameter with NaN at the start of the second epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            next(pl_module.parameters()).data.fill_(float("nan"))


class NoNames(LightningDataModule):
    """Has neither ``num_classes`` nor ``in_channels``."""


class Vanish(Callback):
    """Delete the log folder in the middle of a run."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        folder = Path(str(trainer.log_dir))
        if trainer.current_epoch == 1 and folder.exists():
            shutil.rmtree(folder)


class TestParserErrors:
    @pytest.mark.parametrize(
        ("flags", "mentioned"),
        [
            (["--model.etaa=1"], ["etaa"]),
            (["--data.batchsize=1"], ["batchsize"]),
            (["--trainer.epochs=1"], ["trainer.epochs"]),
            (["--epochs=1"], ["epochs"]),
            (["--model.eta1=fast"], ["eta1", "float", "fast"]),
            (["--model.projections=1.5"], ["projections", "int", "1.5"]),
            (["--model.widths=4"], ["widths", "list"]),
            (["--model.stage=quaternary"], ["stage", "ternary", "binary", "quaternary"]),
            (["--model.schedule=linear"], ["schedule", "cosine", "linear"]),
            (["--trainer.max_epochs=ten"], ["max_epochs", "int", "ten"]),
            (["--trainer.callbacks+=StageSwitch", "--trainer.callbacks.epok=1"], ["epok"]),
            (["--stage_switch.epok=1"], ["epok"]),
            (["--stage_plan.stages=[{stage: binary, etaa: 1}]"], ["stage_plan.stages", "etaa"]),
            (["--stage_plan.stages=[{stage: reel}]"], ["stage_plan.stages", "real, ternary, binary", "reel"]),
            (["--stage_plan.stages=[{stage: binary, eta1: fast}]"], ["stage_plan.stages", "fast"]),
            (["--diversity=FlipRatio"], ["FlipRatio"]),
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


class TestInvalidValues:
    @pytest.mark.parametrize(
        ("flag", "mentioned"),
        [
            ("--model.backbone=vgg19", ["backbone", "vgg19", "wrn22", "vgg_small"]),
            ("--model.widths=[2,2,2]", ["widths", "4", "[2, 2, 2]"]),
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
            ("--data.batch_size=0", ["batch_size", "at least 1", "0"]),
            ("--data.val_fraction=1", ["val_fraction", "[0, 1)", "1"]),
            ("--data.train_size=99999", ["train_size", "at most", "99999"]),
            ("--data.image_size=0", ["image_size", "at least 1", "0"]),
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
    def test_trainer_settings_that_belong_elsewhere(self, command, flags, mentioned):
        """The message points to where the setting belongs."""
        command(*FIT, *flags).is_refused(*mentioned)

    def test_no_such_accelerator(self, command):
        command(*FIT, "--trainer.accelerator=hpu").is_refused("hpu")

    def test_switch_without_a_ternary_model(self, command):
        run = command(*FIT, *SWITCH, "--model.stage=binary", "--trainer.max_epochs=2")
        run.is_refused("StageSwitch", "ternary", "binary")

    @pytest.mark.parametrize(
        ("flags", "mentioned"),
        [
            (["--stage_plan.stages=[{stage: real}, {stage: binary}]"], ["stage real must have epochs"]),
            (["--stage_plan.stages=[{stage: real, epochs: 1}, {stage: binary, epochs: 3}]"], ["epoch 4", "is 2"]),
            (["--stage_plan.stages=[{stage: binary}]", "--stage_switch.epoch=1"], ["stage_switch", "two plans"]),
            (
                ["--stage_plan.stages=[{stage: binary}]", "--model.center_loss_start=soon"],
                ["center_loss_start", "soon"],
            ),
        ],
    )
    def test_impossible_plans(self, command, flags, mentioned):
        command(*FIT, "--trainer.max_epochs=2", *flags).is_refused(*mentioned)

    def test_switch_of_a_full_precision_model_does_nothing(self, command):
        run = command(*FIT, *SWITCH, "--model.full_precision=true", "--trainer.max_epochs=2")
        assert run.code == 0, run.err
        assert run.cli.model.stage == "full_precision"

    def test_switch_at_epoch_zero(self, command):
        command(*FIT, *SWITCH, "--stage_switch.epoch=0").is_refused("epoch", "positive", "0")

    def test_switch_with_an_unknown_monitor(self, command):
        flags = ["--stage_switch.patience=1", "--stage_switch.monitor=val/top1", "--trainer.max_epochs=2"]
        command(*FIT, *SWITCH, *flags).is_refused("val/top1", "val/accuracy")

    def test_checkpoint_with_an_unknown_monitor(self, command):
        command(*FIT, *KEEP, "--checkpoint.monitor=val/top1").is_refused("val/top1", "val/accuracy")

    @pytest.mark.parametrize("label", [3, -1])
    def test_labels_out_of_range(self, command, label):
        data = ["--data=cli_helpers.WrongLabels", f"--data.label={label}"]
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
        command(*self.FIT, f"--data.in_memory={in_memory}").is_refused("images/train holds no images", ".png", ": dog")

    def test_class_missing_from_a_split(self, command, tmp_path):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
        (tmp_path / "images" / "test" / "dog").rename(tmp_path / "images" / "test" / "cow")
        command(*self.FIT).is_refused("images/test", "missing dog", "extra cow")

    @pytest.mark.parametrize(
        "flags",
        [
            ["--data.in_memory=true"],
            ["--data.in_memory=false", "--data.image_size=8"],
            ["--data.in_memory=false", "--data.image_size=8", "--data.num_workers=1"],
        ],
    )
    def test_corrupt_image(self, command, tmp_path, flags):
        make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
        bad = tmp_path / "images" / "train" / "dog" / "2.png"
        bad.write_bytes(bad.read_bytes()[:60])
        command(*self.FIT, "--data.val_fraction=0", *flags).is_refused("images/train/dog/2.png", "cannot be read")

    def test_one_class(self, command, tmp_path):
        """A single class cannot be classified."""
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
        assert not list(Path("kept").glob("*.ckpt")), "a checkpoint of a diverged network"

    def test_last_good_checkpoint(self, command):
        run = command(*FIT, "--trainer.max_epochs=3", *KEEP, f"--trainer.callbacks+={__name__}.Poison")
        run.is_refused("at step 2 ", "epoch 1", code=1)
        error, go_on = run.err.splitlines()
        assert go_on.startswith("To go on, after such a change: ")
        named = Path(error.rpartition(": ")[2].strip())
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


def test_a_log_folder_that_cannot_be_written(command):
    Path("logs").write_text("a file is in its place")
    flags = [flag for flag in FIT if flag != "--trainer.logger=false"]
    run = command(*flags, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs")
    run.is_refused("logs")


def test_a_vanished_log_folder_is_reported_and_leaves_the_last_checkpoint(command):
    flags = [flag for flag in FIT if flag != "--trainer.logger=false"]
    flags += [*KEEP, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs"]
    flags += ["--trainer.callbacks+=LossCurves", f"--trainer.callbacks+={__name__}.Vanish", "--trainer.max_epochs=3"]
    run = command(*flags)
    run.is_refused("logs")
    assert Path("kept/last.ckpt").is_file()


def test_data_without_num_classes(command):
    command("fit", f"--data={__name__}.NoNames", "--model=PCNN", *QUIET).is_refused("NoNames has no num_classes")
