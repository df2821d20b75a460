"""Starting the command line."""

import re
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
from cli_helpers import DIGITS, NETWORK, TRAINING

import pcnn_lightning
from pcnn_lightning.cli.entry import script
from pcnn_lightning.errors import InputError

ROOT = Path(__file__).parents[2]


class TestStarting:
    def test_version(self, command):
        run = command("--version")
        assert (run.code, run.out.strip()) == (0, f"pcnn-lightning {pcnn_lightning.__version__}")

    def test_as_a_module(self):
        run = subprocess.run(
            [sys.executable, "-m", "pcnn_lightning", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (run.returncode, run.stdout.strip()) == (0, f"pcnn-lightning {pcnn_lightning.__version__}"), run.stderr

    def test_console_script(self):
        declared = re.search(r'^pcnn-lightning = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert declared is not None
        assert resolve_name(declared[1]) is script

    def test_console_script_returns_nothing(self, monkeypatch, capsys):
        """Its result is the exit status."""
        monkeypatch.setattr(sys, "argv", ["pcnn-lightning", "summary", *DIGITS, *NETWORK])
        assert script() is None
        assert "classifier" in capsys.readouterr().out

    def test_installed_console_script(self):
        script = Path(sys.executable).with_name("pcnn-lightning")
        if not script.exists():
            pytest.skip("the package is not installed here")
        run = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout.strip()) == (0, f"pcnn-lightning {pcnn_lightning.__version__}"), run.stderr

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
