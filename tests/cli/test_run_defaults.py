"""What every run has by default, and how a configuration or a flag changes it."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from cli_helpers import DIGITS, FIT, NETWORK
from lightning.pytorch.loggers import CSVLogger

from pcnn_lightning import Diversity, FilterCurves, KernelHistograms, LossCurves, StageCheckpoint, StageSwitch
from pcnn_lightning.cli.defaults import DEFAULTS
from pcnn_lightning.loggers import StageLogger

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
RUN = ["fit", *DIGITS, *NETWORK, *QUIET, "--trainer.max_epochs=1"]


def of_kind(run, kind):
    return [callback for callback in run.cli.trainer.callbacks if isinstance(callback, kind)]


def test_a_run_leaves_logs_checkpoints_and_pictures_in_its_folder(command):
    run = command(*RUN, "--run_dir=runs/one")
    assert run.code == 0, run.err
    assert {path.name for path in Path("runs/one").iterdir()} == {"version_0"}
    logs = {path.name for path in Path("runs/one/version_0").iterdir()}
    assert {"losses.png", "kernels.csv", "flips.csv", "filters.png", "diversity_binary.png", "config.yaml"} <= logs
    assert {path.parent.relative_to("runs/one/version_0").as_posix() for path in Path("runs").rglob("*tfevents*")} == {
        "binary/train",
        "binary/val",
        "results",
    }
    checkpoints = {path.name for path in Path("runs/one/version_0/checkpoints").iterdir()}
    assert checkpoints == {"binary.ckpt", "last.ckpt", "stages.json"}
    assert [len(of_kind(run, kind)) for kind in DEFAULTS.values()] == [1] * len(DEFAULTS)
    assert not of_kind(run, StageSwitch)


def test_its_config_repeats_it_elsewhere(command):
    command(*RUN, "--run_dir=runs/one")
    run = command("fit", "--config=runs/one/version_0/config.yaml", "--run_dir=runs/two")
    assert run.code == 0, run.err
    one, two = (Path(f"runs/{name}/version_0/checkpoints") for name in ("one", "two"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert json.loads((one / "stages.json").read_text()) == json.loads((two / "stages.json").read_text())


@pytest.mark.parametrize("key", DEFAULTS)
@pytest.mark.parametrize("by", ["flag", "file"])
def test_each_can_be_turned_off(command, key, by):
    Path("off.yaml").write_text(yaml.safe_dump({key: None}))
    run = command(*RUN, f"--{key}=null" if by == "flag" else "--config=off.yaml", "--trainer.limit_train_batches=1")
    assert run.code == 0, run.err
    assert [len(of_kind(run, kind)) for kind in DEFAULTS.values()] == [int(name != key) for name in DEFAULTS]
    assert bool(list(Path("runs").rglob("*.ckpt"))) == (key != "checkpoint")


def test_each_can_be_changed_by_file_and_flag(command):
    Path("more.yaml").write_text(yaml.safe_dump({"stage_switch": {"epoch": 1}, "filter_curves": {"every_n_steps": 3}}))
    flags = ["--model.stage=ternary", "--trainer.max_epochs=2", "--filter_curves.layer=features.stage2.0.conv"]
    run = command(*RUN, "--config=more.yaml", *flags, "--checkpoint.save_last=false")
    assert run.code == 0, run.err
    (curves,) = of_kind(run, FilterCurves)
    assert (curves.layer, curves.every_n_steps) == ("features.stage2.0.conv", 3)
    assert [switch.first_epochs for switch in of_kind(run, StageSwitch)] == [[0, 1]]
    names = {path.name for path in Path("runs/default/version_0/checkpoints").iterdir()}
    assert names == {"ternary.ckpt", "binary.ckpt", "stages.json"}


def test_a_plan_in_a_file_is_recorded_stage_by_stage(command):
    """A checkpoint of each stage, which an evaluation finds by itself; and the settings that were used."""
    stages = [{"stage": "real", "epochs": 1, "optimizer": "adam", "eta1": 0.01}, {"stage": "binary", "epochs": 1}]
    Path("plan.yaml").write_text(yaml.safe_dump({"stage_plan": {"stages": [*stages, {"stage": "binary"}]}}))
    run = command(*RUN, "--config=plan.yaml", "--trainer.max_epochs=3")
    assert run.code == 0, run.err
    folder = Path("runs/default/version_0")
    assert list(json.loads((folder / "checkpoints/stages.json").read_text())) == ["real", "binary", "binary_2"]
    with (folder / "losses.csv").open() as file:
        assert [row["stage"] for row in csv.DictReader(file)] == ["real", "binary", "binary_2"]
    kept = yaml.safe_load((folder / "config.yaml").read_text())["stage_plan"]["init_args"]["stages"]
    of_first = kept[0].get("init_args", kept[0])
    assert (of_first["optimizer"], of_first["eta1"]) == ("adam", 0.01)
    assert {path.name for path in folder.iterdir()} >= {"real", "binary", "binary_2"}  # charts of TensorBoard


def test_the_best_of_a_stage_that_layers_enter_is_tested(command):
    plan = "--stage_plan.stages=[{stage: real, epochs: 1}, {stage: binary, layer_by_layer: 0.5}]"
    run = command(*RUN, plan, "--trainer.max_epochs=3")
    assert run.code == 0, run.err
    record = json.loads(Path("runs/default/version_0/checkpoints/stages.json").read_text())
    assert list(record) == ["real", "to_binary", "binary"]
    tested = command("test", *RUN[1:], plan, "--ckpt_path=best")
    assert tested.code == 0, tested.err
    with Path("runs/default/version_0/test.csv").open() as file:
        assert [row["stage"] for row in csv.DictReader(file)] == ["binary"]


def test_a_callback_of_the_trainer_replaces_the_default_of_its_class(command):
    callbacks = ["--trainer.callbacks+=KernelHistograms", "--trainer.callbacks.bins=7"]
    run = command(*RUN, *callbacks, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss")
    assert run.code == 0, run.err
    assert [histograms.bins for histograms in of_kind(run, KernelHistograms)] == [7]
    assert len(of_kind(run, LossCurves)) == len(of_kind(run, Diversity)) == 1


def test_logger_and_checkpoints_follow_the_trainer(command):
    run = command(*RUN, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=csv", "--run_dir=runs/one")
    assert [type(logger) for logger in run.cli.trainer.loggers] == [CSVLogger]
    assert {path.name for path in Path("csv/lightning_logs/version_0").iterdir()} == {"metrics.csv", "hparams.yaml"}
    assert Path("runs/one/version_0/checkpoints/last.ckpt").is_file()
    run = command(*RUN, "--trainer.logger=false", "--trainer.enable_checkpointing=false", "--run_dir=runs/two")
    assert run.code == 0, run.err
    assert not run.cli.trainer.loggers
    assert not of_kind(run, StageCheckpoint)
    assert not list(Path("runs/two").rglob("*.ckpt"))
    assert [type(logger) for logger in command(*RUN).cli.trainer.loggers] == [StageLogger]


def test_testing_finds_the_best_of_the_run_folder(command):
    command(*RUN, "--run_dir=runs/one")
    run = command("test", *DIGITS, *NETWORK, *QUIET, "--run_dir=runs/one", "--ckpt_path=best")
    assert run.code == 0, run.err
    command("test", *DIGITS, *NETWORK, *QUIET, "--run_dir=runs/two", "--ckpt_path=best").is_refused("best", "runs/two")


def test_a_run_without_a_name_goes_to_the_default_folder(command):
    run = command(*FIT)
    assert run.code == 0, run.err
    assert Path("runs/default/version_0/checkpoints/last.ckpt").is_file()
    assert not [path for path in Path().iterdir() if path.name != "runs"]
