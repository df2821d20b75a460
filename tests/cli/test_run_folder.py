"""The folder of a run: a resumed run continues it, and evaluation logs into it."""

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cli_helpers import DIGITS, FIT, NETWORK, SWITCH, TRAINING, same_weights
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import fit, tiny_pcnn

from pcnn_lightning import LossCurves, StageCheckpoint
from pcnn_lightning.checkpoints import folder_of_run
from pcnn_lightning.cli.run_folder import begin_run

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
LOGGED = ["fit", *DIGITS, *NETWORK, *QUIET, *SWITCH, "--data.batch_size=16", "--trainer.max_epochs=4"]


class Kill(Callback):
    """End a run in the middle of its third epoch, without a checkpoint."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == 10:
            raise KeyboardInterrupt


class Elsewhere(Logger):
    """Like that of Weights & Biases: its ``save_dir`` is the same for all runs, which have names as versions."""

    save_dir, name = ".", "project"

    def __init__(self, version: str = "a1") -> None:
        super().__init__()
        self._version = version

    @property
    def version(self) -> str:
        return self._version

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, *_: object, **__: object) -> None: ...


class Nothing(Callback):
    """In place of ``Kill``."""


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by sub-run and tag."""
    found = {}
    for path in sorted({file.parent for file in Path(folder).rglob("*tfevents*")}):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if tag not in ("epoch", "hp_metric"):
                name = (path.relative_to(folder) / tag).as_posix()
                found[name] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir() if "tfevents" not in path.name}


@pytest.mark.parametrize("logger", [[], ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs"]])
def test_a_resumed_run_continues_its_folder_and_curves(command, logger):
    """The run is killed after it has logged more than its checkpoint holds."""
    log = "--trainer.log_every_n_steps=1"
    runs, logs = Path("runs/default"), Path("logs/lightning_logs" if logger else "runs/default")
    whole = command(*LOGGED, *logger, log, f"--trainer.callbacks+={__name__}.Nothing")
    curves = scalars(f"{logs}/version_0")
    logs.rename("whole_logs")
    if logger:
        runs.rename("whole")
    else:
        Path("whole").symlink_to("whole_logs")
    assert command(*LOGGED, *logger, log, f"--trainer.callbacks+={__name__}.Kill").code != 0
    again = command(*LOGGED, *logger, log, f"--trainer.callbacks+={__name__}.Nothing", "--ckpt_path=last")
    assert again.code == 0, again.err
    assert [path.name for path in runs.iterdir()] == [path.name for path in logs.iterdir()] == ["version_0"]
    assert names(f"{runs}/version_0") == names("whole/version_0")
    assert scalars(f"{logs}/version_0") == curves
    assert same_weights(again.cli.model, whole.cli.model)
    for name in ("losses.csv", "kernels.csv", "flips.csv", "filters.csv"):
        assert (runs / "version_0" / name).read_text() == Path("whole/version_0", name).read_text(), name
    whole, again = (command("compare", folder).out.splitlines()[5:] for folder in ("whole", runs))
    assert [line.split()[-6:] for line in whole] == [line.split()[-6:] for line in again]


def test_a_run_killed_after_its_last_checkpoint_gets_its_curves(command):
    command(*LOGGED)
    shutil.copytree("runs/default/version_0/checkpoints", "killed/version_0/checkpoints")
    again = command(*LOGGED, "--run_dir=killed", "--ckpt_path=last")
    assert again.code == 0, again.err
    assert "best val/accuracy" in again.out
    late = {"diversity_ternary.png", "times.csv", "ternary", "binary"}  # drawn and logged before the kill
    assert names("killed/version_0") == names("runs/default/version_0") - late
    for name in ("losses.csv", "kernels.csv", "flips.csv", "filters.csv"):
        assert Path("killed/version_0", name).read_text() == Path("runs/default/version_0", name).read_text(), name
    curves = scalars("runs/default/version_0")
    killed = scalars("killed/version_0")
    for stage in ("ternary", "binary"):
        name = f"results/results/best_{stage}"
        assert killed[name][-1] == curves[name][-1]


def test_evaluation_logs_into_the_folder_of_the_run(command):
    command(*LOGGED)
    before = scalars("runs/default/version_0")
    tested = command("test", *DIGITS, *NETWORK, *QUIET, "--ckpt_path=best")
    assert tested.code == 0, tested.err
    command("predict", *DIGITS, *NETWORK, *QUIET, "--ckpt_path=best")
    assert names("runs/default") == {"version_0"}
    after = scalars("runs/default/version_0")
    assert {tag: values for tag, values in after.items() if "/test_" not in tag} == before
    assert len(after["results/results/test_accuracy"]) == 1
    with Path("runs/default/version_0/test.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["test/accuracy"]) == after["results/results/test_accuracy"][0][1]
    assert Path(row["checkpoint"]).name == "binary.ckpt"
    with Path("runs/default/version_0/per_class_binary.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert [one["class"] for one in classes] == [*"0123456789"]
    share = sum(int(one["correct"]) for one in classes) / sum(int(one["images"]) for one in classes)
    assert share == pytest.approx(float(row["test/accuracy"]))
    assert {"confusion_binary.csv", "confusion_binary.png"} <= names("runs/default/version_0")


def test_a_csv_log_is_continued_by_a_resumed_run_and_by_a_test(command):
    def rows():
        with Path("logs/lightning_logs/version_0/metrics.csv").open(newline="") as file:
            return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]

    log = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.log_every_n_steps=1"]
    command(*LOGGED, *log, f"--trainer.callbacks+={__name__}.Nothing")
    whole = rows()
    shutil.rmtree("logs")
    command(*LOGGED, *log, f"--trainer.callbacks+={__name__}.Kill")
    again = command(*LOGGED, *log, f"--trainer.callbacks+={__name__}.Nothing", "--ckpt_path=last")
    assert again.code == 0, again.err
    assert rows() == whole
    tested = command("test", *DIGITS, *NETWORK, *QUIET, *log[:2], "--ckpt_path=best")
    assert tested.code == 0, tested.err
    assert rows()[:-1] == whole
    assert "test/accuracy" in rows()[-1]


def test_a_run_that_saved_nothing_is_not_passed_over(command):
    command(*LOGGED)
    (Path("runs/default/version_1") / "checkpoints").mkdir(parents=True)
    again = [*LOGGED, "--trainer.max_epochs=5", "--ckpt_path=last"]
    assert command(*again).code == 0  # a folder in which nothing was trained
    shutil.copy("runs/default/version_0/config.yaml", "runs/default/version_1")
    command(*again).is_refused("--ckpt_path last: the newest run, ", "version_1, ended before it saved a checkpoint")
    assert command("test", *DIGITS, *NETWORK, *QUIET, "--ckpt_path=last").code == 0


def test_a_run_that_starts_from_the_checkpoint_of_another_folder_has_its_own(command):
    command(*LOGGED)
    path = "runs/default/version_0/checkpoints/ternary.ckpt"
    run = command(*LOGGED, "--run_dir=runs/other", f"--ckpt_path={path}")
    assert run.code == 0, run.err
    assert Path("runs/other/version_0/checkpoints/last.ckpt").is_file()
    assert names("runs/default") == {"version_0"}


def test_a_folder_that_was_moved_is_continued(command):
    command(*FIT)
    Path("runs").rename("moved")
    run = command(*FIT, "--run_dir=moved/default", "--trainer.max_epochs=2", "--ckpt_path=last")
    assert run.code == 0, run.err
    assert names("moved/default") == {"version_0"}
    assert not Path("runs").exists()


def test_barebones_adds_nothing(command):
    flags = ["--trainer.accelerator=cpu", "--trainer.barebones=true", "--trainer.max_steps=1"]
    run = command("fit", *DIGITS, *NETWORK, *flags)
    assert run.code == 0, run.err
    assert not Path("runs").exists()


def test_a_checkpoint_of_a_run_without_logs_is_found(command):
    command(*FIT)
    assert command("test", *DIGITS, *TRAINING, "--ckpt_path=last").code == 0


LOGGERS = {
    "none": ["--trainer.logger=false"],
    "csv": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"],
    "elsewhere": [f"--trainer.logger={__name__}.Elsewhere"],
    "two": ["--config=two.yaml"],
}
TWO = {"save_dir": "runs/default", "name": ""}
ONE_EPOCH = [*[flag for flag in FIT if "logger" not in flag], "--trainer.log_every_n_steps=1"]


@pytest.mark.parametrize("logger", LOGGERS)
def test_the_files_of_a_run_are_in_its_folder_whatever_the_logger(command, logger):
    kinds = [{"class_path": kind, "init_args": TWO} for kind in ("TensorBoardLogger", "CSVLogger")]
    Path("two.yaml").write_text(json.dumps({"trainer": {"logger": kinds}}))
    for run in (0, 1):
        ended = command(*ONE_EPOCH, *LOGGERS[logger], f"--model.eta1=0.{run + 1}")
        assert ended.code == 0, ended.err
    runs = Path("runs/default")
    assert names("runs/default") == {"version_0", "version_1"}
    files = {"config.yaml", "checkpoints", "losses.csv", "losses.png", "kernels.csv", "flips.csv", "filters.csv"}
    assert files <= names("runs/default/version_0") == names("runs/default/version_1")
    assert (runs / "version_0/losses.csv").read_text() != (runs / "version_1/losses.csv").read_text()
    assert ("metrics.csv" in names("runs/default/version_1")) == (logger == "two")
    assert names(".") <= {"runs", "two.yaml", "logs"}
    again = command(*ONE_EPOCH, *LOGGERS[logger], "--ckpt_path=last", "--trainer.max_epochs=2")
    assert again.code == 0, again.err
    assert len((runs / "version_1/losses.csv").read_text().splitlines()) == 3
    assert names("runs/default") == {"version_0", "version_1"}


def test_the_folder_of_a_run_in_python_is_that_of_its_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loggers = [Elsewhere("a1"), Elsewhere("a2"), TensorBoardLogger("tb"), CSVLogger("csv", name=None), False]
    for logger in loggers:
        keep = StageCheckpoint()
        trainer = fit(tiny_pcnn(), logger=logger, callbacks=[keep, LossCurves()], enable_checkpointing=True)
        assert folder_of_run(trainer).resolve() == keep.folder.parent
        assert (keep.folder.parent / "losses.csv").is_file()
    assert {"project", "tb", "csv", "checkpoints", "losses.csv", "losses.png", "times.csv"} == names(".")
    assert names("project") == {"a1", "a2"}


def test_a_run_is_named_by_its_folder(command):
    for eta1 in ("0.1", "0.01"):
        command(*FIT, f"--model.eta1={eta1}")
    first = "--run_dir=runs/default/version_0"
    tested = command("test", *DIGITS, *TRAINING, first, "--ckpt_path=best")
    assert Path(tested.cli.trainer.ckpt_path).parts[-3:] == ("version_0", "checkpoints", "binary.ckpt")
    command(*FIT, first).is_refused("run_dir: runs/default/version_0 is a run already", "--ckpt_path last")
    again = command(*FIT, first, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert again.code == 0, again.err
    assert len(Path("runs/default/version_0/losses.csv").read_text().splitlines()) == 3
    assert command(*FIT, "--run_dir=runs/other/version_7").code == 0
    assert Path("runs/other/version_7/checkpoints/last.ckpt").is_file()
    assert names("runs/default") == {"version_0", "version_1"}
    assert names("runs/other") == {"version_7"}


def test_a_test_of_a_file_leaves_no_folder_of_its_own(command):
    command(*LOGGED, "--run_dir=runs/one")
    shutil.copy("runs/one/version_0/checkpoints/last.ckpt", "mine.ckpt")
    for path in ("mine.ckpt", "runs/one/version_0/checkpoints/last.ckpt"):
        assert command("test", *DIGITS, *QUIET, f"--ckpt_path={path}").code == 0
    assert names("runs") == {"one"}
    assert names("runs/one") == {"version_0"}
    tests = scalars("runs/one/version_0")["results/results/test_accuracy"]
    assert len(tests) == 2, "the run of mine.ckpt is known by its record"


def test_runs_that_begin_at_the_same_time_get_different_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(begin_run, [tmp_path] * 40))
    assert {folder.name for folder in folders} == {f"version_{number}" for number in range(40)}


def test_a_refused_trainer_leaves_no_folder(command):
    command(*FIT, "--trainer.accelerator=hpu").is_refused("hpu")
    assert names("runs/default") == set()
