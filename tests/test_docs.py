"""The documentation: it builds, its commands parse, and its tables are complete."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import ROOT, check_command, check_links, commands
from lightning.pytorch.cli import LightningCLI

from pcnn_lightning.cli import OneBitCLI

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINES = list(dict.fromkeys(line for page in PAGES for line in commands(page)))


@pytest.mark.parametrize("line", LINES)
def test_each_command_parses(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check_command(line, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_somewhere(page):
    check_links(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_python_examples_are_valid(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        ast.parse(block)


def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "site" / "reference" / "layers" / "index.html").read_text(encoding="utf-8")
    for name in ("ProjectionConv2d", "ModulatedConv2d", "BinaryConv2d", "QuantizedConv2d", "SignActivation"):
        assert name in reference


def test_examples_of_a_loop_run(tmp_path):
    text = (DOCS / "guide" / "own_loop.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_example_of_a_family_trains(tmp_path):
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    (example,) = [
        block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "register_family" in block
    ]
    (tmp_path / "my_family.py").write_text(example)
    command = [sys.executable, "-m", "pcnn_lightning", "fit", "--model", "my_family.MaxNet", "--data", "Digits"]
    command += ["--model.widths", "[2,2,2,2]", "--model.backbone", "wrn7", "--trainer.fast_dev_run", "true"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_table_of_configurations_names_every_one():
    table = (DOCS / "guide" / "configuration.md").read_text(encoding="utf-8")
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} == set(
        re.findall(r"`configs/(\w+\.yaml)` \|", table)
    )


@pytest.mark.parametrize("name", sorted(OneBitCLI.subcommands()))
def test_every_subcommand_is_shown(name):
    assert any(re.search(rf"-m pcnn_lightning {name} ", line) for line in LINES)


def test_every_part_of_the_package_has_its_line():
    layout = (DOCS / "contributing.md").read_text(encoding="utf-8").partition("## How the code is laid out")[2]
    layout = layout.partition("```\n\n")[0]
    parts = {path.name for path in (ROOT / "pcnn_lightning").iterdir() if not path.name.startswith(("_", "py.typed"))}
    assert parts == set(re.findall(r"^  (\w+(?:\.py)?)/? ", layout, flags=re.MULTILINE))


def test_every_test_named_as_evidence_exists():
    for name in re.findall(r"`(tests/[\w/]+\.py)`", (DOCS / "reliability.md").read_text(encoding="utf-8")):
        assert Path(ROOT, name).is_file(), name


def test_the_example_of_a_loss_is_logged(tmp_path):
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "LossTerm" in block]
    (tmp_path / "my_loss.py").write_text(example)
    command = [sys.executable, "-m", "pcnn_lightning", "fit", "--model", "my_loss.PenalizedPCNN", "--data", "Digits"]
    command += ["--model.widths", "[2,2,2,2]", "--model.backbone", "wrn7", "--trainer.max_epochs", "1"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    curves = Path(tmp_path, "runs/default/version_0/losses.csv").read_text()
    assert {"train/logit_penalty", "val/logit_penalty"} <= set(curves.splitlines()[0].split(","))


def test_the_reference_has_every_module():
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    package = ROOT / "pcnn_lightning"
    parts = {path.stem for path in package.iterdir() if not path.name.startswith(("_", "py.typed"))}
    assert parts == set(re.findall(r"^::: pcnn_lightning\.(\w+)$", pages, flags=re.MULTILINE))


def test_the_readme_has_the_numbers_of_these_pages():
    def rows(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]

    methods = [cells for cells in rows(DOCS / "results.md") if len(cells) == 6]
    sizes = [cells for cells in rows(DOCS / "deployment.md") if cells[0].startswith("`configs/")]
    readme = rows(ROOT / "README.md")
    assert [cells for cells in readme if cells[0].startswith("`configs/")] == sizes
    assert len(methods) == 11
    assert [cells for cells in readme if len(cells) == 6] == methods


def test_private_names_of_other_packages_are_listed():
    """Names with an underscore that the package uses and does not define, or that it overrides in LightningCLI."""
    used, defined = set(), set()
    for path in (ROOT / "pcnn_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()) | ast.FunctionDef(name=name):
                    defined.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                    defined.add(name)
                case ast.Attribute(attr=name):
                    used.add(name)
                case ast.ImportFrom(module=str(name)):
                    used.update(part for part in name.split(".") if part.startswith("_"))
    theirs = {name for name in used - defined if name.startswith("_") and not name.endswith("__")}
    theirs |= {name for name in defined & set(dir(LightningCLI)) if name.startswith("_") and not name.endswith("__")}
    listed = (DOCS / "contributing.md").read_text(encoding="utf-8").partition("## Private names")[2]
    assert {name for name in theirs if not re.search(rf"\b{name}\b", listed)} == set()
