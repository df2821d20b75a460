"""The README. Its two commands that begin with a virtual environment are run by .ci/run."""

import pytest
from documented import ROOT, check_command, check_links, commands

README = ROOT / "README.md"
LINES = commands(README)


def test_two_commands_install_and_run():
    installing = [line for line in LINES if "-m venv .venv" in line]
    assert len(installing) == 2
    assert "configs/digits.yaml" in installing[0]
    assert "pytest" in installing[1]


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("line", LINES)
def test_each_command_parses(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check_command(line, capsys)


def test_links_lead_somewhere():
    check_links(README)
