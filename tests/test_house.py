"""How the code is laid out: imports run one way, and nobody asks for the family of a layer from outside."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pcnn_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
EVERYBODY = {"checks", "devices", "errors", "files", "stages", "tables", "version"}
MAY_IMPORT: dict[str, set[str]] = {
    "functional": set(),
    "layers": {"functional"},
    "losses": {"layers"},
    "conversion": {"layers"},
    "backbones": {"conversion", "layers"},
    "families": {"layers"},
    "checkpoints": set(),
    "deploy": {"backbones", "families", "layers"},
    "data": set(),
    "loggers": {"losses"},
    "callbacks": {"checkpoints", "functional", "layers", "loggers", "losses"},
    "modules": {"backbones", "checkpoints", "conversion", "deploy", "families", "functional", "layers", "losses"},
    "reports": {"deploy", "layers", "modules"},
    "cli": {"callbacks", "checkpoints", "data", "deploy", "families", "loggers", "modules", "reports"},
    "__main__": {"cli"},
}
WITHOUT_LIGHTNING = ("functional", "layers", "losses", "conversion", "backbones", "families", "deploy")


def imports(path):
    """Modules imported at run time, that is, not under ``if TYPE_CHECKING``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "pcnn_lightning")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    room = room_of(path)
    allowed = EVERYBODY | {room} | MAY_IMPORT.get(room, set())
    found = {name.split(".")[1] for name in imports(path) if name.startswith("pcnn_lightning.")}
    assert found <= allowed
    if room in WITHOUT_LIGHTNING:
        assert not [
            name for name in imports(path) if name.split(".")[0] in ("lightning", "torchmetrics", "jsonargparse")
        ]


def test_no_family_is_asked_for_from_outside():
    pattern = r"isinstance\([^)]*(ProjectionConv2d|ModulatedConv2d|BinaryConv2d|PCNN|MCN|BNN)|== ?\"(PCNN|MCN|BNN)\""
    for path in FILES:
        if room_of(path) not in ("layers", "modules"):
            assert not re.search(pattern, path.read_text(encoding="utf-8")), path


def test_no_test_file_is_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert max(lengths.values()) <= 600
