"""Memory that is left, against the system's own numbers and against those of made-up control groups."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_images import make_folder

from pcnn_lightning.data import ImageFolder, memory
from pcnn_lightning.data.memory import amount, available_memory
from pcnn_lightning.errors import InputError

GB = 10**9


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A root folder of a system with 8,000,000 kB available, these control groups and these files in them."""
    contents = {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable:    8000000 kB\n", "proc/self/cgroup": groups}
    contents |= {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def version_2(folder: str, limit: str, usage: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {cache}\nactive_file 7\n"
    return {f"{folder}memory.max": limit, f"{folder}memory.current": str(usage), f"{folder}memory.stat": stat}


def version_1(folder: str, limit: int, usage: int, cache: int = 0) -> dict[str, str]:
    folder = f"memory/{folder}"
    stat = f"inactive_file 1\ntotal_inactive_file {cache}\n"
    return {
        f"{folder}memory.limit_in_bytes": f"{limit}\n",
        f"{folder}memory.usage_in_bytes": str(usage),
        f"{folder}memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 8_192_000_000),
        ("0::/job\n", version_2("job/", "max", 1), 8_192_000_000),
        ("0::/job\n", version_2("job/", f"{4 * GB}\n", GB), 3 * GB),
        ("0::/job\n", version_2("job/", str(4 * GB), 3 * GB, cache=2 * GB), 3 * GB),
        ("0::/job/task\n", version_2("job/", str(2 * GB), GB) | version_2("job/task/", "max", GB), GB),
        ("0::/../elsewhere\n", version_2("", str(2 * GB), GB), GB),  # a container sees its own group as the root
        ("0::/job\n", version_2("job/", str(GB), 2 * GB), 0),
        ("5:cpu:/a\n4:memory:/job\n", version_1("job/", 6 * GB, 3 * GB, cache=GB), 4 * GB),
        ("4:memory:/docker/1\n", version_1("", 2 * GB, GB), GB),
        ("4:memory:/job\n", version_1("job/", 2**63 - 4096, GB), 8_192_000_000),
    ],
)
def test_the_least_of_the_system_and_its_control_groups_is_taken(tmp_path, groups, files, expected):
    assert available_memory(system(tmp_path, groups, files)) == expected


def test_it_is_unknown_on_other_systems(tmp_path):
    assert available_memory(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="free is a program of Linux")
def test_it_is_at_most_what_free_says():
    table = subprocess.run(["free", "-b"], capture_output=True, text=True, check=True).stdout.splitlines()
    by_name = dict(zip(table[0].split(), table[1].split()[1:], strict=True))
    found = available_memory()
    assert found is not None
    assert 0 < found < int(by_name["available"]) + GB


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (27_095_040, "27.1 MB"), (10**13, "10,000.0 GB")],
)
def test_amounts(size, text):
    assert amount(size) == text


def test_images_that_memory_cannot_hold_are_refused_before_it_is_taken(tmp_path, monkeypatch):
    root = make_folder(tmp_path, {"train": {"a": 6, "b": 4}})
    monkeypatch.setattr(memory, "available_memory", lambda: 10 * 3 * 8 * 8 - 1)
    with pytest.raises(InputError) as caught:
        ImageFolder(str(root)).setup("fit")
    assert str(caught.value) == (
        "10 images of 8×8 pixels take 1.9 kB of memory, but 1.9 kB are available: "
        "read them from disk by --data.in_memory false, or set a smaller --data.image_size"
    )
    with pytest.raises(InputError, match=r"10 images of 100000×100000 pixels take 300\.0 GB of memory"):
        ImageFolder(str(root), image_size=100_000, in_memory=True).setup("fit")
    ImageFolder(str(root), image_size=7).setup("fit")
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    ImageFolder(str(root)).setup("fit")
