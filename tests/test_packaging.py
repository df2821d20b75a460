"""What a user gets who does not have a checkout: the wheel, its page on PyPI, and the workflows that make them."""

import re
import shlex
import subprocess
import sys
import zipfile
from email import message_from_bytes

import pytest
import yaml
from documented import ROOT

import pcnn_lightning

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Source"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_has_every_file_of_the_package_and_the_configurations(wheel):
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pcnn_lightning").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    configs = {f"pcnn_lightning/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == package | configs
    assert len(configs) > 10


def test_every_link_on_its_page_leads_out_of_that_page(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    page = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert [target for target in re.findall(r"\]\(([^)]+)\)", page) if not target.startswith("https://")] == []
    pictures = [url for url in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page) if "/main/" in url]
    assert pictures
    assert all(url.startswith("https://raw.githubusercontent.com/") for url in pictures)  # GitHub's pages are HTML
    ours = re.findall(r"/pcnn_lightning/(?:blob/)?main/([^)#]+)", page)
    assert len(ours) > 10
    assert [path for path in ours if not (ROOT / path).is_file()] == []


def test_everything_names_the_same_repository():
    files = ["README.md", "CITATION.cff", "mkdocs.yml", "pyproject.toml", "docs/index.md", "notebooks/quickstart.ipynb"]
    for file in [*map(ROOT.joinpath, files), *(ROOT / ".github").rglob("*.yml")]:
        text = file.read_text(encoding="utf-8")
        owners = re.findall(r"(?:github\.com/|githubusercontent\.com/|/github/)([\w-]+/pcnn_lightning)\b", text)
        owners += [f"{owner}/pcnn_lightning" for owner in re.findall(r"([\w-]+)\.github\.io/pcnn_lightning", text)]
        assert {f"https://github.com/{owner}" for owner in owners} <= {REPOSITORY}, file


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (pcnn_lightning.__version__, PROJECT["license"])
    assert citation["repository-code"] == REPOSITORY


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_what_there_is(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}  # a job says so if it needs more
    extras = set(PROJECT["optional-dependencies"])
    for job in workflow["jobs"].values():
        assert set([job["needs"]] if "needs" in job else []) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert re.fullmatch(r"(actions|pypa)/[\w-]+@(v\d+|release/v1)", step.get("uses", "actions/none@v1"))
            for words in map(shlex.split, step.get("run", "").splitlines()):
                assert words[0] in ("pip", "uv", "mkdocs", "git", "test", ".venv/bin/python", ".ci/run", ".ci/wheel")
                if words[0].startswith(".ci/"):
                    assert (ROOT / words[0]).stat().st_mode & 0o100
                assert {extra for word in words for extra in re.findall(r"^\.\[(\w+)\]$", word)} <= extras


def test_the_oldest_python_that_is_supported_is_tested():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    oldest = PROJECT["requires-python"].removeprefix(">=")
    pythons = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert oldest in pythons
    assert {f"Programming Language :: Python :: {python}" for python in pythons} <= set(PROJECT["classifiers"])
    setups = [step["with"] for step in workflow["jobs"]["lowest"]["steps"] if "setup-python" in step.get("uses", "")]
    assert setups == [{"python-version": oldest}]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_what_is_needed(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    if path.stem == "bug_report":
        assert {"command", "config", "versions"} <= set(ids)
