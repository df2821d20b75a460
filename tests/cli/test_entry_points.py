"""Starting the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import DIGITS, FIT, NETWORK, TRAINING

import pcnn_lightning
from pcnn_lightning.errors import InputError

ROOT = Path(__file__).parents[2]


class TestStarting:
    def test_version(self, command):
        run = command("--version")
        assert (run.code, run.out.strip()) == (0, f"pcnn_lightning {pcnn_lightning.__version__}")

    def test_as_a_module(self):
        run = subprocess.run(
            [sys.executable, "-m", "pcnn_lightning", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (run.returncode, run.stdout.strip()) == (0, f"pcnn_lightning {pcnn_lightning.__version__}"), run.stderr

    def test_console_script(self, tmp_path):
        """As pip installs it: ``sys.exit(run())``, whose status is what ``run`` returns."""
        declared = re.search(r'^pcnn_lightning = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert declared is not None
        module, _, function = declared[1].partition(":")
        script = tmp_path / "pcnn_lightning"
        script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
        command = [sys.executable, script, *FIT, "--trainer.fast_dev_run=true"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert "OneBitCLI" not in run.stdout + run.stderr

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
        with pytest.raises(InputError):
            command("test", *DIGITS, *TRAINING)
