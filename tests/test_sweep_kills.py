"""Sweeps that are killed or interrupted, and started again, end as unbroken ones."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RUN = ["--data=Digits", "--data.train_size=300", "--data.batch_size=20", "--data.image_size=8", "--model=PCNN"]
RUN += ["--model.backbone=wrn7", "--model.widths=[4,4,8,8]", "--model.projections=2", "--model.stage=ternary"]
RUN += ["--stage_switch.epoch=3", "--trainer.accelerator=cpu", "--trainer.max_epochs=8"]
GRID = ["--grid=model.projection_loss_weight=1e-3,0", "--grid=model.eta2=0.01,0.001", "--grid=seed_everything=0,1,2"]
TABLES = ("losses.csv", "test.csv", "kernels.csv", "flips.csv", "filters.csv")


def start(folder, *added):
    """Start a sweep in ``folder``."""
    command = [sys.executable, "-m", "pcnn_lightning", "sweep", *RUN, *(added or GRID), "--out=runs", "--jobs=2"]
    with (folder / "out").open("ab") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)


def output(folder):
    return (folder / "out").read_text()


def wait_until(condition, process):
    """Wait for ``condition``, while ``process`` is at work."""
    while not condition():
        assert process.poll() is None
        time.sleep(0.05)


def at_work(folder):
    """The processes of the runs of the sweep in ``folder``, data loaders included."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"--run_dir" in (process / "cmdline").read_bytes() and (process / "cwd").resolve() == folder.resolve():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def epochs(folder):
    """The number of epochs that all runs have trained."""
    tables = folder.glob("runs/*/version_*/losses.csv")
    return sum(len(table.read_text().splitlines()) - 1 for table in tables)


def test_a_sweep_killed_twice_ends_with_the_same_tables(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert start(whole).wait() == 0, output(whole)

    sweep = start(killed)
    wait_until(lambda: epochs(killed) >= 20, sweep)  # some have ended, and two are at work
    sweep.kill()  # its runs find themselves alone, and end
    sweep.wait()
    sweep = start(killed)
    wait_until(lambda: epochs(killed) >= 50, sweep)
    for process in (sweep.pid, *at_work(killed)):
        os.kill(process, signal.SIGKILL)
    sweep.wait()
    assert start(killed).wait() == 0, output(killed)

    names = sorted(path.name for path in (whole / "runs").iterdir() if path.is_dir())
    assert len(names) == 12
    for name in names:
        for table in TABLES:
            one, other = (folder / "runs" / name / "version_0" / table for folder in (whole, killed))
            assert one.read_bytes() == other.read_bytes(), (name, table)
    compare = [sys.executable, "-m", "pcnn_lightning", "compare", "runs", "--format=csv"]
    tables = [subprocess.check_output(compare, cwd=folder, text=True) for folder in (whole, killed)]
    assert without_minutes(tables[0]) == without_minutes(tables[1])
    assert len(without_minutes(tables[0])) == 4 * 2  # a row for each stage of four settings


def without_minutes(table):
    rows = csv.DictReader(table.splitlines())
    return [{name: cell for name, cell in row.items() if "minutes" not in name} for row in rows]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_ends_its_runs_and_goes_on(tmp_path, number, status):
    grid = ["--grid=seed_everything=0,1", "--trainer.max_epochs=60", "--stage_switch.epoch=20"]
    sweep = start(tmp_path, *grid)
    wait_until(lambda: epochs(tmp_path) >= 4, sweep)
    sweep.send_signal(number)
    assert sweep.wait() == status, output(tmp_path)
    assert not at_work(tmp_path)
    assert output(tmp_path).splitlines()[-1] == "Run the same command again to go on with the sweep."
    done = epochs(tmp_path)
    assert len(list(tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt"))) == 2
    sweep = start(tmp_path, *grid)
    assert sweep.wait() == 0, output(tmp_path)
    assert epochs(tmp_path) == 120 > done
    assert not list(tmp_path.glob("runs/*/version_1"))


def test_a_sweep_at_work_is_not_disturbed_by_another(tmp_path):
    grid = ["--grid=seed_everything=0", "--trainer.max_epochs=1000"]
    sweep = start(tmp_path, *grid)
    wait_until(lambda: epochs(tmp_path) >= 1, sweep)
    other = start(tmp_path, *grid)
    assert other.wait() == 2
    assert "another sweep is at work in runs" in output(tmp_path).splitlines()[-1]
    sweep.send_signal(signal.SIGINT)
    sweep.wait()
