"""Completion in the shell: bash itself is asked what it would offer."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELLS = ("bash", "zsh")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The folder of the scripts as a process of its own prints them, in which no test has made up classes."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        command = [sys.executable, "-m", "pcnn_lightning", "--print_completion", shell]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        (folder / shell).write_text(run.stdout)
    return folder


@pytest.fixture
def offered(scripts, tmp_path):
    """What bash offers for the last of the words of a command, in a folder with a file and a folder in it."""
    (tmp_path / "my.yaml").touch()
    (tmp_path / "runs").mkdir()

    def offer(*words):
        asked = f"""
            source {shlex.quote(str(scripts / "bash"))}
            complete -p pcnn_lightning > /dev/null || exit
            COMP_WORDS=({shlex.join(["pcnn_lightning", *words])})
            COMP_CWORD={len(words)}
            _shtab_pcnn_lightning
            echo "${{COMPREPLY[@]}}"
        """
        run = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, "")
        return set(run.stdout.split())

    return offer


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["f"], {"fit"}),
        (["fit", "--model.st"], {"--model.stage"}),
        (["fit", "--model.stage", ""], {"real", "ternary", "binary"}),
        (["fit", "--model", "P"], {"PCNN"}),
        (["fit", "--model.help", "M"], {"MCN"}),
        (["fit", "--data", "C"], {"CIFAR10", "CIFAR100"}),
        (["fit", "--trainer.precision", "bf16-"], {"bf16-true", "bf16-mixed"}),
        (["fit", "--config", "digits"], {"digits.yaml"}),  # comes with the package
        (["fit", "--config", "my"], {"my.yaml"}),
        (["fit", "--run_dir", "r"], {"runs"}),
        (["test", "--ckpt_path", "r"], {"runs"}),
        (["export", "--format", ""], {"packed", "openvino", "c", "onnx", "torch"}),
        (["compare", "r"], {"runs"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_offers(offered, words, expected):
    assert offered(*words) == expected


def test_bash_offers_every_subcommand(offered):
    assert offered("") == {"fit", "validate", "test", "predict", "summary", "benchmark", "export", "sweep", "compare"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_small(scripts, shell):
    """With the arguments of all strategies and plugins it would have 200 MB."""
    assert 50_000 < (scripts / shell).stat().st_size < 1_000_000


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_its_script(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    run = subprocess.run([shell, "-n", scripts / shell], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_an_unknown_shell_is_refused(command):
    command("--print_completion", "ksh").is_usage_error("--print_completion", "ksh", "bash", "zsh")
