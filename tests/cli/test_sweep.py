"""Sweeps: their grids, what is refused before anything runs, and what they leave."""

import csv
import itertools
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_helpers import DIGITS, NETWORK, QUIET
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback

from pcnn_lightning.cli.names import packaged_sweeps
from pcnn_lightning.cli.sweep.folder import locked
from pcnn_lightning.cli.sweep.local import _reason
from pcnn_lightning.cli.sweep.plan import Plan, parse_axis, read_plan

ROOT = Path(__file__).parents[2]
RUN = [*DIGITS, *NETWORK, *QUIET, "--trainer.max_epochs=1"]
SWEEP = ["sweep", *RUN, "--out=runs"]
ETA = "--grid=model.eta1=0.05,0.1"


def nothing_began():
    return not any(path.name.startswith(("version_", "runs")) for path in Path().rglob("*"))


keys = st.from_regex(r"[a-z]{1,4}\.k[a-z0-9]{0,3}", fullmatch=True)
values = st.from_regex(r"v[a-z0-9]{0,3}", fullmatch=True)  # words without a meaning in YAML


@given(st.dictionaries(keys, st.lists(values, min_size=1, max_size=4, unique=True), min_size=1, max_size=3))
def test_a_grid_is_the_product_of_its_axes(grid):
    plan = Plan(shared=["--trainer.max_epochs=1"])
    for key, words in grid.items():
        plan.grid.update(parse_axis(f"{key}={','.join(words)}"))
    runs = plan.runs()
    assert [run.args for run in runs] == [
        ["--trainer.max_epochs=1", *(f"--{key}={word}" for key, word in zip(grid, words, strict=True))]
        for words in itertools.product(*grid.values())
    ]
    assert len({run.name for run in runs}) == math.prod(map(len, grid.values()))


def test_lists_true_and_null_are_values():
    (run, other) = Plan(grid=parse_axis("model.widths=[2,2,2,2],[4, 4, 4, 4]")).runs()
    assert (run.name, run.args) == ("widths=2_2_2_2", ["--model.widths=[2, 2, 2, 2]"])
    assert other.name == "widths=4_4_4_4"
    words = [run.args for run in Plan(grid=parse_axis("a=true,null,x")).runs()]
    assert words == [["--a=true"], ["--a=null"], ["--a=x"]]


def test_keys_that_end_alike_are_named_in_full():
    grid = {**parse_axis("model.x=1"), **parse_axis("data.x=2"), **parse_axis("data.y=3")}
    assert Plan(grid=grid).runs()[0].name == "model.x=1,data.x=2,y=3"


def test_the_file_of_a_sweep_changes_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "out: a\nconfig: x.yaml\narguments: {seed_everything: 1, model.eta1: 0.1}\n"
        "grid: {kind: {one: {config: one.yaml, model.a: 1}, two: {config: two.yaml}}, model.b: [1, 2]}\n"
    )
    (tmp_path / "own.yaml").write_text(
        "base: base.yaml\nout: b\narguments: {model.eta1: 0.2}\ngrid: {kind: {two: {model.a: [1, 2]}}, model.b: [3]}\n"
    )
    plan = read_plan(tmp_path / "own.yaml")
    shared = ["--config=x.yaml", "--seed_everything=1", "--model.eta1=0.2"]
    assert plan.out == Path("b")
    assert [run.args for run in plan.runs()] == [
        ["--config=one.yaml", *shared, "--model.a=1", "--model.b=3"],
        ["--config=two.yaml", *shared, "--model.a=[1, 2]", "--model.b=3"],
    ]
    assert [run.name for run in plan.runs()] == ["kind=one,b=3", "kind=two,b=3"]


REFUSED = {
    "an unknown key": (["--grid=model.nonsense=1,2"], ("nonsense=1", "nonsense")),
    "a value that does not parse": (["--grid=model.eta1=0.1,fast"], ("eta1=fast", "eta1", "float")),
    "a value that the class refuses": (["--grid=model.projections=1,0"], ("projections=0", "must be")),
    "a value that the trainer refuses": (["--grid=trainer.precision=8-mixed"], ("precision=8-mixed",)),
    "values that are not YAML": (["--grid=model.widths=[1,2"], ("model.widths=[1,2", "brackets")),
    "no values": (["--grid=model.eta1="], ("model.eta1", "one or more values")),
    "no key": (["--grid=0.1,0.2"], ("KEY=VALUE",)),
    "a value given twice": (["--grid=model.eta1=0.1,0.2,0.1"], ("share a folder", "eta1", "0.1")),
    "values of the same name": (["--grid=data.root=a b,a_b"], ("share the folder root=a_b",)),
    "values that are equal": (["--grid=model.eta1=0.1,1e-1"], ("eta1=0.1", "eta1=1e-1", "the same run")),
    "configurations as values": (["--grid=config=a.yaml,b.yaml"], ("config cannot be an axis",)),
    "a name too long": ([f"--grid=data.root={'a' * 300},b"], ("305 bytes", "200")),
    "no grid": ([], ("grid",)),
    "no folder": (["--out=null", ETA], ("out is missing",)),
    "a folder that holds other files": (["--out=full", ETA], ("full", "other.txt")),
    "a file in place of the folder": (["--out=full/other.txt", ETA], ("other.txt",)),
    "no jobs": ([ETA, "--jobs=0"], ("jobs", "at least 1")),
    "two executors": ([ETA, "--print", "--slurm", "--gpus=1"], ("print", "slurm")),
    "one run and a grid": ([ETA, "--run_dir=x"], ("run_dir",)),
    "an axis twice": (["--grid=model.eta1=0.1", "--grid=model.eta1=0.2"], ("model.eta1", "twice")),
    "an axis outside the folder": (["--grid=../../evil=1"], ("../../evil", "cannot be an axis")),
    "an endless value": (["--grid=model.widths=&a [*a]"], ("model.widths",)),
    "too many runs": ([f"--grid=a{n}={','.join(map(str, range(30)))}" for n in range(3)], ("27,000", "10,000")),
    "weights only": ([ETA, "--checkpoint.save_weights_only=true"], ("save_weights_only",)),
    "no last checkpoint": ([ETA, "--checkpoint.save_last=false"], ("save_last",)),
    "a checkpoint for all": ([ETA, "--ckpt_path=last"], ("ckpt_path",)),
    "no test": ([ETA, "--trainer.limit_test_batches=0"], ("limit_test_batches",)),
    "one root for all": ([ETA, "--trainer.default_root_dir=x"], ("default_root_dir",)),
    "no checkpoints": ([ETA, "--checkpoint=null"], ("eta1=0.05", "checkpoint")),
    "checkpoints in one folder": ([ETA, "--checkpoint.dirpath=kept"], ("dirpath",)),
    "no records": ([ETA, "--loss_curves=null"], ("loss_curves",)),
    "stages beyond the run": (["--grid=stage_plan.stages=[{stage: real, epochs: 1}, {stage: binary}]"], ("epoch 1",)),
    "a switch of a binary model": (["--stage_switch.epoch=1", "--grid=model.stage=ternary,binary"], ("stage=binary",)),
    "a run without files": ([ETA, "--trainer.fast_dev_run=true"], ("fast_dev_run",)),
    "no configuration of that name": ([ETA, "--config=missing.yaml"], ("eta1=0.05", "missing.yaml")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused_in_one_line_before_anything_runs(command, name):
    Path("full").mkdir()
    Path("full/other.txt").touch()
    added, mentioned = REFUSED[name]
    command(*SWEEP, *added).is_refused(*mentioned)
    assert nothing_began()


FILES = {
    "missing": (None, ("no sweep file own.yaml",)),
    "other keys": ("{grid: {a: [1]}, epochs: 3}", ("base, out, config, arguments, grid", "epochs")),
    "no mapping": ("- 1", ("base, out, config, arguments, grid",)),
    "not YAML": ("grid: [", ("not YAML",)),
    "a grid that is a list": ("grid: [1, 2]", ("grid must map",)),
    "a scalar as values": ("grid: {model.eta1: 0.1}", ("model.eta1", "0.1")),
    "a value that is no mapping": ("grid: {kind: {one: 3}}", ("kind: one", "3")),
    "a number as a configuration": ("{grid: {a: [1]}, config: [3]}", ("config", "3")),
    "a list as the folder": ("{grid: {a: [1]}, out: [3]}", ("out", "[3]")),
    "a value that JSON cannot hold": ("grid: {kind: {one: {model.a: {2020-01-01: 3}}}}", ("command line",)),
    "a value that holds itself": ("grid: {model.a: &a [[*a]]}", ("command line",)),
    "its own base": ("{base: own.yaml}", ("itself",)),
    "a base that is missing": ("{base: missing.yaml}", ("missing.yaml",)),
    "arguments that are a list": ("{grid: {a: [1]}, arguments: [1]}", ("arguments", "[1]")),
}


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_files_of_sweeps_are_refused_in_one_line(command, name):
    content, mentioned = FILES[name]
    if content is not None:
        Path("own.yaml").write_text(content)
    command("sweep", "own.yaml", *RUN, "--out=runs").is_refused(*mentioned)
    assert nothing_began()


def rows(file):
    with Path(file).open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_print_prepares_a_folder_for_each_run_with_its_configuration_and_command(command):
    printed = command(*SWEEP, ETA, "--grid=seed_everything=0,1", "--print")
    names = [f"eta1={eta},seed_everything={seed}" for eta in ("0.05", "0.1") for seed in (0, 1)]
    assert printed.out.splitlines() == [f"python -m pcnn_lightning sweep --run_dir runs/{name}" for name in names]
    assert printed.err == ""
    assert yaml.safe_load(Path("runs/sweep.yaml").read_text())["runs"][names[1]] == {
        "eta1": "0.05",
        "seed_everything": "1",
    }
    config = yaml.safe_load(Path("runs", names[1], "config.yaml").read_text())
    assert (config["model"]["init_args"]["eta1"], config["seed_everything"]) == (0.05, 1)
    assert config["model"]["init_args"]["weight_decay"] is not None  # complete: with all defaults
    _, _, _, subcommand, *arguments = shlex.split(Path("runs", names[1], "command.txt").read_text())
    assert subcommand == "fit"

    done = command(*shlex.split(printed.out.splitlines()[1])[3:])
    assert done.code == 0, done.err
    alone = command("fit", *arguments[:-1], "alone")
    assert alone.code == 0, alone.err
    ours, theirs = (rows(f"{folder}/version_0/losses.csv") for folder in (f"runs/{names[1]}", "alone"))
    assert ours == theirs
    (test,) = rows(f"runs/{names[1]}/version_0/test.csv")
    assert test["checkpoint"].endswith("version_0/checkpoints/binary.ckpt")
    assert len(command(*SWEEP, ETA, "--grid=seed_everything=0,1", "--print").out.splitlines()) == 3
    assert "has finished" in command("sweep", "--run_dir", f"runs/{names[1]}").out


def test_a_sweep_can_have_more_values_later_but_no_other_settings(command):
    assert command(*SWEEP, ETA, "--print").code == 0
    before = Path("runs/eta1=0.1/config.yaml").read_bytes()
    again = command(*SWEEP, "--grid=model.eta1=0.1,0.2", "--print")
    assert [line.rpartition("/")[2] for line in again.out.splitlines()] == ["eta1=0.1", "eta1=0.2"]
    assert list(yaml.safe_load(Path("runs/sweep.yaml").read_text())["runs"]) == ["eta1=0.05", "eta1=0.1", "eta1=0.2"]
    assert Path("runs/eta1=0.1/config.yaml").read_bytes() == before
    command(*SWEEP, ETA, "--trainer.max_epochs=7", "--print").is_refused("eta1=0.05", "trainer.max_epochs", "1", "7")
    command(*SWEEP, ETA, "--grid=seed_everything=0,1", "--print").is_refused("another sweep", "seed_everything")
    more = "--grid=model.eta1=0.3"  # which has no run in common with the others
    command(*SWEEP, more, "--trainer.max_epochs=7", "--print").is_refused("other arguments", "--trainer.max_epochs=1")
    Path("runs/sweep.yaml").write_text("runs: [1]")
    command(*SWEEP, ETA, "--print").is_refused("sweep.yaml", "damaged")


def test_a_value_keeps_its_settings_within_a_sweep(command):
    sweep = ["sweep", "own.yaml", *RUN, "--out=runs", "--print"]
    Path("own.yaml").write_text("grid: {rate: {none: {}, low: {model.eta1: 0.05}}}")
    assert command(*sweep).code == 0
    shutil.rmtree("runs/rate=low")
    for changed, mentioned in [("{model.eta1: 0.02}", "--model.eta1=0.02"), ("{}", "nothing")]:
        Path("own.yaml").write_text(f"grid: {{rate: {{low: {changed}}}}}")
        command(*sweep).is_refused("rate=low", "--model.eta1=0.05", mentioned)


def test_a_run_that_is_none_of_a_sweep_is_refused(command):
    command("sweep", "--run_dir=nowhere").is_refused("nowhere", "config.yaml")


def test_slurm_gets_an_array_job_that_runs_each_run(command, tmp_path):
    name, wanted = "it's here", "-p gpu --time=4:00:00 --comment='a b'"
    said = command("sweep", *RUN, ETA, "--out", name, "--slurm", wanted)
    assert said.out == f"sbatch {shlex.quote(f'{name}/sweep.sbatch')}\n"
    script = Path(name, "sweep.sbatch").read_text()
    options = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"--array=0-1", "--signal=SIGUSR1@120", "--requeue", wanted} <= options
    assert f'--output="{tmp_path.resolve()}/{name}/slurm-%A_%a.txt"' in options
    (tmp_path / "srun").write_text('#!/bin/sh\npwd\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for task, run in enumerate(("eta1=0.05", "eta1=0.1")):
        environment["SLURM_ARRAY_TASK_ID"] = str(task)
        lines = subprocess.check_output(["bash", f"{name}/sweep.sbatch"], env=environment, text=True).splitlines()
        asked = [sys.executable, "-m", "pcnn_lightning", "sweep", "--run_dir", f"{name}/{run}"]
        assert lines == [str(tmp_path.resolve()), *asked]


def test_a_requeued_job_of_slurm_goes_on_from_its_own_checkpoint(command, monkeypatch):
    """Before the end of the first epoch, the checkpoint that SLURM's signal makes is the only one."""
    for name in ("NTASKS", "JOB_ID", "PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", {"NTASKS": "1", "JOB_ID": "7"}.get(name, "0"))
    monkeypatch.setenv("SLURM_JOB_NAME", "sweep")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")
    more = ["--grid=seed_everything=0", "--trainer.max_epochs=2", "--data.batch_size=4"]
    assert command(*SWEEP, *more, "--print").code == 0
    run = Path("runs/seed_everything=0")
    config = yaml.safe_load((run / "config.yaml").read_text())
    added = {"class_path": f"{__name__}.Requeue", "init_args": {}}
    config["trainer"]["callbacks"] = [added]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert command("sweep", "--run_dir", run).code != 0
    assert [path.name for path in run.rglob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    config["trainer"]["callbacks"] = [{**added, "class_path": f"{__name__}.FirstStep"}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    again = command("sweep", "--run_dir", run)
    assert again.code == 0, again.err
    assert "first step 3" in again.out
    assert [path.name for path in run.iterdir() if path.is_dir()] == ["version_0"]


class Requeue(Callback):
    """Save what Lightning saves on SLURM's signal, and end the run."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
            raise KeyboardInterrupt


class FirstStep(Callback):
    """Print the step that training goes on from."""

    def on_train_start(self, trainer, *_):
        print(f"first step {trainer.global_step}")


def test_a_run_is_not_trained_by_two_processes(command):
    assert command(*SWEEP, ETA, "--print").code == 0
    run = Path("runs/eta1=0.1")
    with locked(run, "held"):
        command("sweep", "--run_dir", run).is_refused("eta1=0.1 is running already")
    assert not list(run.glob("version_*"))


def test_only_the_sweep_itself_says_that_a_run_has_finished(command):
    assert command(*SWEEP, "--grid=seed_everything=0", "--print").code == 0
    run = ["--config=runs/seed_everything=0/config.yaml", "--run_dir=runs/seed_everything=0"]
    assert command("fit", *run).code == 0
    assert command("test", *run, "--ckpt_path=best").code == 0
    assert len(command(*SWEEP, "--grid=seed_everything=0", "--print").out.splitlines()) == 1


def test_numbers_stay_as_they_were_typed():
    labels = parse_axis("x=010,1e-3,0:10,[1, 1e-3]")["x"]
    assert list(labels) == ["010", "1e-3", "0:10", '[1, "1e-3"]']


def test_values_of_a_file_are_chosen_by_name_and_the_file_may_stand_anywhere(command):
    chosen = command(
        "sweep", "--out=runs", "methods.yaml", "--grid", "method=mcn,u_mcn", "--print", "--data.root=nowhere"
    )
    assert [line.rpartition("/")[2] for line in chosen.out.splitlines()] == [
        f"method={name},seed_everything={seed}" for name in ("mcn", "u_mcn") for seed in range(3)
    ]
    command("sweep", "methods.yaml", "--grid=method=mcm", "--out=other").is_refused("mcm", "mcn, mcn_1, u_mcn")


def test_runs_share_the_machine_and_a_failed_one_stops_no_other(command, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    grid = ["--grid=model.eta1=1e9,0.05", "--grid=seed_everything=0,1"]
    ended = command(*SWEEP, *grid, "--jobs=2", "--trainer.max_epochs=2")
    assert ended.code == 1
    assert sum("test accuracy" in line for line in ended.out.splitlines()) == 2
    failed = [line for line in ended.err.splitlines() if line.startswith("failed: eta1=1e9")]
    assert len(failed) == 2
    assert all("log.txt" in line for line in failed)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for seed in (0, 1):
        folder = f"runs/eta1=0.05,seed_everything={seed}/version_0"
        (test,) = rows(f"{folder}/test.csv")
        assert 0 <= float(test["test/accuracy"]) <= 1
        assert all(row["device"].startswith(f"CPU, {threads} thread") for row in rows(f"{folder}/times.csv"))
        assert not list(Path(f"runs/eta1=1e9,seed_everything={seed}").rglob("test.csv"))


def test_a_run_that_failed_again_is_reported_with_its_last_error(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("error: the disk is full\n")
    before = log.stat().st_size
    assert _reason(log, before) == "no output"  # killed
    with log.open("a") as file:
        file.write("epoch 1\nValueError: of the second attempt\nepoch 2\n")
    assert _reason(log, before) == "ValueError: of the second attempt"
    assert _reason(log, 0) == "ValueError: of the second attempt"


@pytest.mark.parametrize("name", sorted(packaged_sweeps().keys() - {"published.yaml"}))
def test_the_sweeps_that_come_along_are_valid(command, name):
    printed = command("sweep", name, "--out=runs", "--print", "--data.root=nowhere", "--grid=seed_everything=0")
    assert printed.code == 0, printed.err
    assert len(printed.out.splitlines()) in (3, 4, 9, 19)  # of one seed


def yaml_blocks(page):
    text = (ROOT / "docs" / "guide" / page).read_text(encoding="utf-8")
    return [yaml.safe_load(block.partition("```")[0]) for block in text.split("```yaml\n")[1:]]


def test_the_file_in_the_guide_is_that_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (own,) = [block for block in yaml_blocks("sweeps.md") if "out" in block]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    runs = read_plan(tmp_path / "own.yaml").runs()
    assert runs[-1].name == "method=pcnn,seed_everything=2,eta1=0.05"
    assert len(runs) == 11 * 3 * 2  # with the nine methods of its base
    assert all(Path(word.partition("=")[2]).is_file() for word in runs[-1].args if word.startswith("--config="))


def test_the_arguments_that_wandb_gives_are_those_of_fit(command):
    (sweep,) = [block for block in yaml_blocks("sweeps.md") if "command" in block]
    given = [f"--{name}={choices['values'][0]}" for name, choices in sweep["parameters"].items()]
    words = [word for one in sweep["command"] for word in (given if one == "${args}" else [one])]
    assert words[:3] == ["python", "-m", "pcnn_lightning"]
    shown = yaml.safe_load(command(*words[3:], "--print_config").out)
    assert shown["model"]["init_args"]["projection_loss_weight"] == 1e-3
    assert shown["seed_everything"] == 0
