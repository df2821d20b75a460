"""The commands and links in Markdown files."""

import re
import shlex
from pathlib import Path

import pytest

from pcnn_lightning.cli import main

ROOT = Path(__file__).parents[1]
LOOPS = {"$weight": "1e-4", "$precision": "bf16-mixed", "$batch": "128", "$config": "cifar", "$seed": "0"}
OURS = re.compile(r"(srun |OMP_NUM_THREADS=1 )?(python|torchrun .*) -m pcnn_lightning ")
OTHERS = (
    *("source ", "tensorboard ", "tar ", "#", "for ", "done"),
    *("pip install", "pytest", "python -m venv", "mkdocs ", "pre-commit ", "cc ", "arm-none-eabi-"),
    *("xargs ", "sbatch "),
)


def commands(path: Path) -> list[str]:
    """The lines of a file's shell blocks."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def check_command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Parse a command of ours up to the point where data or a checkpoint would be needed; know the kind of others."""
    if not OURS.match(line):
        assert line.startswith(OTHERS) or "-m venv .venv" in line, f"unknown kind of command: {line}"
        return
    for name, value in LOOPS.items():
        line = line.replace(name, value)
    words = shlex.split(line.partition(" > ")[0], comments=True)
    subcommand, *arguments = words[words.index("pcnn_lightning") + 1 :]
    if "--ckpt_path" in arguments and arguments[arguments.index("--ckpt_path") + 1] not in ("best", "last"):
        position = arguments.index("--ckpt_path")
        del arguments[position : position + 2]  # a file that only a trained run leaves
    helps = any(word.endswith(("help", "--print_completion")) for word in (subcommand, *arguments))
    with pytest.raises(SystemExit) as exit:
        main([subcommand, *arguments, *([] if helps or "--print_config" in arguments else ["--print_config"])])
    assert exit.value.code == 0, capsys.readouterr().err


def check_links(path: Path) -> None:
    """Check that relative links and pictures exist."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
