"""Runs that are ended by signals at random moments, and resumed until they are done, end as unbroken ones."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pcnn_lightning.callbacks.stage_checkpoint import LAST, RECORD

ROUNDS = 8
"""Signals to each kind of run, at least."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDED = (0, 130, 143, *(-number for number in SIGNALS))
"""Exit statuses of a run that is done or was ended; before it trains and after, signals kill it."""
RUN = Path("runs/default/version_0")
DATA = ["--data=Digits", "--data.train_size=600", "--data.batch_size=20", "--data.image_size=8"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=7"]
PCNN = ["--model=PCNN", "--model.backbone=wrn7", "--model.widths=[4,4,8,8]", "--model.stage=ternary"]
PCNN += ["--model.projections=2", "--model.eta2=0.01", "--stage_switch.epoch=5"]
MCN = ["--model=MCN", "--model.backbone=mcn8", "--model.widths=[4,4,8,8]", "--model.planes=2", "--model.eta2=0.01"]
CENTERS = ["--model.center_loss_weight=0.001"]
AVERAGED = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.init_args.decay=0.9"]
RUNS = {
    "workers and centers of the second stage": [
        *(*PCNN, *CENTERS, "--model.center_loss_start=binary", "--data.num_workers=2"),
    ],
    "accumulation, bf16 and rare validation": [
        *(*PCNN, "--model.accumulate=4", "--trainer.precision=bf16-mixed", "--trainer.check_val_every_n_epoch=2"),
    ],
    "averaged weights and late centers": [*MCN, *CENTERS, "--model.center_loss_start=4", *AVERAGED],
    "validation amid an epoch": [*MCN, "--model.accumulate=3", "--trainer.val_check_interval=0.4"],
}


def start(folder: Path, flags: list[str]) -> subprocess.Popen[bytes]:
    """Start a run, and wait until it sets itself up."""
    command = [sys.executable, "-m", "pcnn_lightning", "fit", *DATA, *QUIET, "--trainer.max_epochs=12", *flags]
    out = folder / "out"
    before = len(out.read_bytes()) if out.exists() else 0
    with out.open("ab") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file)
    while b"GPU available" not in out.read_bytes()[before:] and process.poll() is None:
        time.sleep(0.02)
    return process


def run_whole(folder: Path, flags: list[str]) -> float:
    """Run without a break. Returns the seconds that it takes."""
    folder.mkdir()
    process, began = start(folder, flags), time.monotonic()
    assert process.wait() == 0, (folder / "out").read_text()
    return time.monotonic() - began


def run_broken(folder: Path, flags: list[str], rounds: int, longest: float, rng: random.Random) -> list[int]:
    """Run until done, ended by at most ``rounds`` signals. Returns the exit statuses."""
    folder.mkdir()
    statuses: list[int] = []
    while not statuses or statuses[-1] != 0:
        resume = ["--ckpt_path=last"] if (folder / RUN / "checkpoints" / LAST).exists() else []
        if not resume and (folder / RUN).exists():  # nothing was saved: begin anew, as a user would
            (folder / RUN).rename(folder / f"unsaved_{len(statuses)}")
        process = start(folder, [*flags, *resume])
        try:
            process.wait(rng.uniform(0, longest) if len(statuses) < rounds else None)
        except subprocess.TimeoutExpired:
            process.send_signal(rng.choice(SIGNALS))
        statuses.append(process.wait())
        assert statuses[-1] in ENDED, (folder / "out").read_text()
    return statuses


def assert_same(broken: Path, whole: Path) -> None:
    """The files, the record, the curves and all weights are the same."""
    names, found = (
        {path.relative_to(run) for path in run.rglob("*") if "tfevents" not in path.name} for run in (whole, broken)
    )
    assert found == names
    record = json.loads((whole / "checkpoints" / RECORD).read_text())
    assert json.loads((broken / "checkpoints" / RECORD).read_text()) == record
    for name in (LAST, *(best["checkpoint"] for best in record.values())):
        ours, theirs = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (broken, whole))
        assert ours["global_step"] == theirs["global_step"], name
        for key, value in theirs["state_dict"].items():
            assert torch.equal(ours["state_dict"][key], value), (name, key)
    for path in names:
        if path.suffix == ".csv":
            assert (broken / path).read_text() == (whole / path).read_text(), path


@pytest.mark.slow
@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_run_ended_at_random_moments_ends_as_an_unbroken_one(tmp_path, flags):
    longest = run_whole(tmp_path / "whole", flags) / 3
    rng, rounds = random.Random(len(flags)), ROUNDS
    for number in itertools.count():
        broken = tmp_path / f"broken_{number}"
        statuses = run_broken(broken, flags, rounds, longest, rng)
        print(statuses)
        assert_same(broken / RUN, tmp_path / "whole" / RUN)
        rounds -= len(statuses) - 1
        if rounds <= 0:
            break
