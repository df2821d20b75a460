"""Signals, full disks and requeued jobs."""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_helpers import DIGITS, FIT, KEEP, TRAINING, load, same_weights
from lightning.pytorch import Callback, LightningModule, Trainer

from pcnn_lightning.checkpoints import AtomicCheckpointIO

ROOT = Path(__file__).parents[2]


class Signal(Callback):
    """Send the process a signal in the middle of a run."""

    def __init__(self, name: str, batch: int = 3) -> None:
        self.number, self.batch = signal.Signals[name], batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            signal.raise_signal(self.number)


class SignalInSetup(Callback):
    """Send SIGINT while a run sets itself up."""

    def setup(self, *_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)


class SignalInTest(Callback):
    """Send SIGTERM in the first batch of a test."""

    def on_test_batch_start(self, *_: object) -> None:
        signal.raise_signal(signal.SIGTERM)


class FirstStep(Callback):
    """Record the step at which a run starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_an_interrupted_run_resumes_where_it_stopped(command, name, status):
    whole = command(*FIT, *KEEP, "--trainer.max_epochs=3").cli.model.state_dict()
    shutil.rmtree("kept")
    arguments = [*FIT, *KEEP, "--trainer.max_epochs=3"]
    before = signal.getsignal(signal.SIGINT)
    ended = command(*arguments, f"--trainer.callbacks+={__name__}.Signal", f"--trainer.callbacks.name={name}")
    assert ended.code == status
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 4
    python, module, name, *again = shlex.split(ended.err.splitlines()[-1].removeprefix("To go on: "))
    assert (python, module, name) == ("python", "-m", "pcnn_lightning")
    assert again[-2:] == ["--ckpt_path", "kept/last.ckpt"]
    resumed = command(*(word for word in again if "callbacks" not in word))
    assert resumed.code == 0
    for key, value in resumed.cli.model.state_dict().items():
        assert torch.equal(value, whole[key]), key


def test_ctrl_c_before_the_first_batch_has_the_status_of_ctrl_c(command):
    assert command(*FIT, f"--trainer.callbacks+={__name__}.SignalInSetup").code == 130
    assert not list(Path().rglob("*.ckpt"))


class FailInSecondEpoch(Callback):
    """An error of the user's own code."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise IndexError("mine")


def test_an_error_of_other_code_tells_how_to_go_on(command, capsys):
    with pytest.raises(IndexError):
        command(
            *FIT, "--run_dir=my runs", f"--trainer.callbacks+={__name__}.FailInSecondEpoch", "--trainer.max_epochs=2"
        )
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("To go on: python -m pcnn_lightning fit ")
    assert last.endswith(" --ckpt_path 'my runs/version_0/checkpoints/last.ckpt'")


def test_max_time_tells_how_to_go_on(command):
    endless = [*FIT, "--trainer.max_epochs=9999", "--trainer.max_time=00:00:00:02", "--model.schedule=constant"]
    run = command(*endless)
    assert run.code == 0
    said = run.err.splitlines()[-1]
    assert said.startswith("To go on, with a longer trainer.max_time: ")
    again = shlex.split(said)[-1]
    longer = command(*endless, "--trainer.max_time=00:00:00:04", f"--ckpt_path={again}")
    assert longer.cli.trainer.global_step > run.cli.trainer.global_step


def test_nothing_is_said_about_going_on_if_there_is_nothing_to_go_on_from(command):
    assert "To go on" not in command(*FIT).err
    poisoned = [*FIT, "--model.eta1=1e20", "--trainer.max_epochs=3"]
    assert "To go on" not in command(*poisoned).err, "it diverges in its first epoch"
    weights = ["--checkpoint.save_weights_only=true", f"--trainer.callbacks+={__name__}.Signal"]
    ended = command(*FIT, *weights, "--trainer.callbacks.name=SIGTERM", "--trainer.max_epochs=3")
    assert ended.code == 143
    assert "To go on" not in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 0.4, 0.9])
def test_sigterm_to_one_of_two_processes_ends_both(tmp_path, wait):
    """Amid a batch, either process may be waiting for the other one's gradients."""
    command = [sys.executable, "-m", "pcnn_lightning", *FIT, *KEEP, "--trainer.devices=2", "--trainer.strategy=ddp"]
    command += ["--trainer.max_epochs=500", "--data.batch_size=4", "--trainer.log_every_n_steps=5"]
    with Path(tmp_path, "out").open("w") as out:
        run = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=out, stderr=out)
        end = time.monotonic() + 120
        while not (tmp_path / "kept/last.ckpt").exists() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(wait)
        run.send_signal(signal.SIGTERM)
        try:
            assert run.wait(60) == 143, Path(tmp_path, "out").read_text()
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    assert load(tmp_path / "kept/last.ckpt")["global_step"] > 0


def test_an_interrupted_evaluation_leaves_no_checkpoint(command):
    command(*FIT, *KEEP)
    before = {file.name: file.read_bytes() for file in Path("kept").iterdir()}
    flags = [*KEEP, "--ckpt_path=last", f"--trainer.callbacks+={__name__}.SignalInTest"]
    ended = command("test", *DIGITS, *TRAINING, *flags)
    assert ended.code == 143
    assert {file.name: file.read_bytes() for file in Path("kept").iterdir()} == before


@pytest.mark.slow
def test_ctrl_c_with_workers_leaves_a_checkpoint(tmp_path):
    """A terminal sends SIGINT to the whole process group."""
    config = ROOT / "configs" / "digits.yaml"
    command = [sys.executable, "-m", "pcnn_lightning", "fit", f"--config={config}", "--data.init_args.num_workers=2"]
    command += ["--trainer.enable_progress_bar=false"]
    with Path(tmp_path, "out").open("w") as out:
        run = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=out, stderr=out)
        last = tmp_path / "runs/digits/version_0/checkpoints/last.ckpt"
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


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The environment of a job with one process, and a ``scontrol`` that does nothing."""
    values = {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train", "JOB_ID": "7"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("NTASKS_PER_NODE", "NNODES", "ARRAY_JOB_ID"):  # set if the tests themselves run in a job
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_a_job_that_slurm_requeues_amid_a_batch_ends_with_the_same_weights(command, slurm, batch):
    arguments = [*FIT, "--trainer.devices=1", "--trainer.max_epochs=3"]
    signals = [f"--trainer.callbacks+={__name__}.Signal", "--trainer.callbacks.name=SIGUSR1"]
    first = command(*arguments, *signals, f"--trainer.callbacks.batch={batch}")  # SLURM would end it after the signal
    assert first.code == 0, first.err
    (saved,) = Path("runs").rglob("hpc_ckpt_*.ckpt")
    assert load(saved)["global_step"] == batch + 1
    again = command(*arguments)
    assert again.code == 0, again.err
    assert Path(str(again.cli.trainer.ckpt_path)).resolve() == saved.resolve()
    assert [path.name for path in Path("runs/default").iterdir()] == ["version_0"]
    assert same_weights(first.cli.model, again.cli.model)


def test_a_run_requeued_by_slurm_is_resumed(command, slurm):
    command(*FIT, *KEEP, "--trainer.devices=1")
    Path("kept/last.ckpt").rename("hpc_ckpt_1.ckpt")
    shutil.copy("hpc_ckpt_1.ckpt", "hpc_ckpt_0.ckpt")
    os.utime("hpc_ckpt_0.ckpt", (0, 0))
    flags = ["--trainer.devices=1", f"--trainer.callbacks+={__name__}.FirstStep"]
    run = command(*FIT, "--trainer.max_epochs=2", "--trainer.default_root_dir=.", *flags)
    assert run.code == 0, run.err
    assert Path(str(run.cli.trainer.ckpt_path)).name == "hpc_ckpt_1.ckpt"
    assert [callback.step for callback in run.cli.trainer.callbacks if isinstance(callback, FirstStep)] == [2]
    assert run.cli.trainer.global_step == 4


def test_a_job_is_not_given_the_checkpoint_of_another_job(command, slurm, monkeypatch):
    arguments = [*FIT, "--trainer.devices=1", "--trainer.max_epochs=3"]
    command(*arguments, f"--trainer.callbacks+={__name__}.Signal", "--trainer.callbacks.name=SIGUSR1")
    (saved,) = Path("runs").rglob("hpc_ckpt_*.ckpt")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    other = command(*arguments)
    assert other.code == 0, other.err
    assert other.cli.trainer.ckpt_path is None
    assert {path.name for path in Path("runs/default").iterdir()} == {"version_0", "version_1"}
    shutil.copy(saved, "hpc_ckpt_1.ckpt")
    refused = command(*arguments, "--trainer.default_root_dir=.")
    refused.is_refused("hpc_ckpt_1.ckpt is of another SLURM job: name it with --ckpt_path")


def test_a_job_whose_node_failed_goes_on_from_its_last_epoch(command, slurm, monkeypatch):
    arguments = [*FIT, "--trainer.devices=1"]
    assert command(*arguments).code == 0
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert command(*arguments).code == 0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = command(*arguments, "--trainer.max_epochs=2")
    assert Path(str(again.cli.trainer.ckpt_path)).parts[-3:] == ("version_0", "checkpoints", "last.ckpt")


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


def test_a_full_disk_is_reported_and_leaves_the_last_checkpoint(command, monkeypatch):
    command(*FIT, *KEEP)
    before = Path("kept/last.ckpt").read_bytes()

    def full(descriptor: int) -> None:
        if "last.ckpt" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    run = command(*FIT, *KEEP, "--trainer.max_epochs=2", "--ckpt_path=last")
    run.is_refused("kept/last.ckpt cannot be written", "No space left on device")
    assert "--trainer.max_epochs=2 --ckpt_path kept/last.ckpt" in run.err.splitlines()[-1], (
        "without its own --ckpt_path"
    )
    assert Path("kept/last.ckpt").read_bytes() == before
    assert not list(Path("kept").glob("*.part"))
