"""Commands, called in-process, and a trained network."""

import sys

import pytest
from cli_helpers import DIGITS, FIT, KEEP, QUIET, SWITCH, Run

from pcnn_lightning.cli import main


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pcnn_lightning"])
    monkeypatch.delenv("PCNN_LIGHTNING_TRACEBACK", raising=False)

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        code: object = 0
        cli = None
        try:
            cli = main([str(argument) for argument in arguments])
        except SystemExit as leave:
            code = leave.code
        return Run(code, *capsys.readouterr(), cli)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The checkpoint folder of a progressive run: a ternary epoch and a binary one."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pcnn_lightning"])
        main([*FIT, "--trainer.max_epochs=2", *SWITCH, *KEEP, "--model.eta1=0.05"])
    return folder / "kept"


@pytest.fixture(scope="session")
def packed(trained):
    """A packed file of the trained binary network, of 8×8 images."""
    path = trained / "digits.safetensors"
    main(["export", *DIGITS, *QUIET, f"--ckpt_path={trained}/last.ckpt", f"--output={path}"])
    return path
