"""``fit``: configurations, seeds and what is printed."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from cli_helpers import DIGITS, FIT, KEEP, SWITCH, same_weights

ROOT = Path(__file__).parents[2]


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
        arguments = [*FIT, "--run_dir=runs/x", *SWITCH, "--trainer.max_epochs=2", "--seed_everything=3"]
        first = command(*arguments)
        assert first.code == 0, first.err
        again = command("fit", "--config=runs/x/version_0/config.yaml")
        assert again.code == 0, again.err
        assert Path("runs/x/version_1/config.yaml").is_file()
        assert again.cli.model is not first.cli.model
        assert same_weights(first.cli.model, again.cli.model)
        other = command(*arguments, "--seed_everything=4")
        assert not same_weights(first.cli.model, other.cli.model), "the seed has no effect"

    def test_saved_config_of_a_resumed_run(self, command, trained):
        """The saved configuration includes the settings of the checkpoint."""
        flags = [
            f"--ckpt_path={trained / 'last.ckpt'}",
            "--trainer.max_epochs=3",
            "--trainer.enable_progress_bar=false",
        ]
        first = command("fit", *DIGITS, "--trainer.accelerator=cpu", "--run_dir=runs/x", *flags)
        assert first.code == 0, first.err
        again = command("fit", "--config=runs/x/version_0/config.yaml")
        assert again.code == 0, again.err
        assert same_weights(first.cli.model, again.cli.model)

    def test_config_in_the_working_folder_stays_as_it_was(self, command, tmp_path):
        mine = tmp_path / "config.yaml"
        mine.write_text("# mine\nmodel:\n  class_path: PCNN\n  init_args:\n    eta1: 0.03\n")
        before = mine.read_text()
        assert command(*FIT, "--config=config.yaml").code == 0
        assert mine.read_text() == before

    def test_debug_leaves_no_files(self, command, tmp_path):
        """Above all no last.ckpt, which a later ``--ckpt_path last`` would load."""
        run = command(*FIT, *KEEP, f"--config={ROOT / 'configs' / 'debug.yaml'}")
        assert run.code == 0, run.err
        assert run.cli.trainer.global_step == 1
        assert not list(tmp_path.rglob("*.ckpt"))


def test_fit_prints_the_summary_unless_disabled(command):
    arguments = [argument for argument in FIT if argument != "--trainer.enable_model_summary=false"]
    run = command(*arguments, "--model.stage=ternary", "--trainer.limit_train_batches=1")
    assert "Compression: " in run.out
    assert max(map(len, run.out.splitlines())) <= 80
    assert "Compression: " not in command(*FIT, "--trainer.limit_train_batches=1").out


@pytest.mark.parametrize("family", [["--model.stage=ternary", "--stage_switch.patience=null"], ["--model=MCN"]])
def test_the_same_seed_gives_the_same_bits_with_any_number_of_workers(command, family):
    switch = ["--stage_switch.epoch=1"] if "--model=MCN" not in family else ["--model.levels=3"]
    flags = [*FIT, *family, *switch, "--trainer.max_epochs=2", "--trainer.deterministic=true"]
    ends = [
        command(*flags, f"--data.num_workers={workers}", f"--seed_everything={seed}").cli.model.state_dict()
        for seed, workers in ((1, 0), (1, 2), (2, 0))
    ]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert not all(torch.equal(ends[0][name], value) for name, value in ends[2].items())


def test_batches_of_one_image(command):
    run = command(*FIT, "--data.batch_size=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2")
    assert run.code == 0, run.err
    assert run.cli.trainer.global_step == 3


@pytest.mark.parametrize("computes", [False, True])
def test_bf16_on_a_cpu_that_converts_it_in_software_is_warned_of(command, monkeypatch, computes):
    found = {"architecture": "x86_64", "avx512_bf16": computes, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    ended = command(*FIT, "--config=cpu_bf16.yaml", "--trainer.limit_train_batches=1")
    assert ended.code == 0
    assert ("converts bfloat16 in software" in ended.err) == (not computes)


def test_the_summary_in_the_folder_of_a_run_is_of_its_last_stage(command):
    progressive = [*FIT, *SWITCH, "--trainer.enable_model_summary=true"]
    for epochs, stored in ((1, "parameters_2bit"), (2, "parameters_1bit")):
        assert command(*progressive, f"--trainer.max_epochs={epochs}", f"--run_dir={epochs}").code == 0
        with Path(f"{epochs}/version_0/summary.csv").open(newline="") as file:
            total = list(csv.DictReader(file))[-1]
        counts = {name: int(total[name]) for name in ("parameters_1bit", "parameters_2bit")}
        assert counts[stored] == sum(counts.values()) > 0
