"""The README's commands: the two that begin with a virtual environment are run by .ci/run, the others here."""

import re
import shlex
from pathlib import Path

import pytest

from pcnn_lightning.cli import OneBitCLI, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:sh|bash)\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
LOOPS = {"$weight": "1e-4", "$precision": "bf16-mixed", "$batch": "128", "$config": "cifar"}
OURS = [
    line
    for line in LINES
    if re.match(r"(srun |OMP_NUM_THREADS=1 )?(python|torchrun .*) -m pcnn_lightning (?!compare)", line)
]


def test_two_commands_install_and_run():
    installing = [line for line in LINES if "-m venv .venv" in line]
    assert len(installing) == 2
    assert "configs/digits.yaml" in installing[0]
    assert "pytest" in installing[1]


def test_every_command_is_of_a_known_kind():
    others = [line for line in LINES if line not in OURS and "-m venv .venv" not in line]
    known = ("source ", "tensorboard ", "tar ", "#", "for ", "done", "python -m pcnn_lightning compare ")
    assert [line for line in others if not line.startswith(known)] == []


@pytest.mark.parametrize("line", OURS)
def test_each_command_parses(line, monkeypatch, capsys):
    """Up to the point where data or a checkpoint would be needed."""
    monkeypatch.chdir(ROOT)
    for name, value in LOOPS.items():
        line = line.replace(name, value)
    words = shlex.split(line, comments=True)
    subcommand, *arguments = words[words.index("pcnn_lightning") + 1 :]
    if "--ckpt_path" in arguments and arguments[arguments.index("--ckpt_path") + 1] not in ("best", "last"):
        position = arguments.index("--ckpt_path")
        del arguments[position : position + 2]  # a file that only a trained run leaves
    with pytest.raises(SystemExit) as exit:
        main([subcommand, *arguments, "--print_config"])
    assert exit.value.code == 0, capsys.readouterr().err


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_configuration_table_names_every_configuration():
    table = set(re.findall(r"`configs/(\w+\.yaml)`", README))
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} <= table


@pytest.mark.parametrize("name", sorted({*OneBitCLI.subcommands(), "compare"} - {"validate"}))
def test_every_subcommand_is_shown(name):
    assert re.search(rf"-m pcnn_lightning {name} ", README)


def test_every_part_of_the_package_has_its_line():
    layout = README.partition("## How the code is laid out")[2].partition("\n## ")[0]
    parts = {path.name for path in (ROOT / "pcnn_lightning").iterdir() if not path.name.startswith(("_", "py.typed"))}
    assert parts == set(re.findall(r"^  (\w+(?:\.py)?)/? ", layout, flags=re.M))
