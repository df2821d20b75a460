"""How much memory is left, so that a run that needs more ends with a message and not by the kernel."""

from collections.abc import Iterator
from pathlib import Path

from pcnn_lightning.errors import InputError


def check_memory(what: str, needed: int, advice: str) -> None:
    """Require memory that is there.

    Args:
        what: what takes the memory.
        needed: number of bytes.
        advice: what can be done, as the end of a sentence.

    Raises:
        InputError: if there is less; nothing is known, and checked, on other systems than Linux.
    """
    available = available_memory()
    if available is not None and needed > available:
        raise InputError(f"{what} take {amount(needed)} of memory, but {amount(available)} are available: {advice}")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still take, or None if they are not known.

    That is the least of what the system and each of the control groups around the process (of a container or of a
    SLURM job) have left. Caches count as free.

    Args:
        root: folder that holds ``proc`` and ``sys``.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            found += _left_in_groups(root / "sys/fs/cgroup", *line.split(":", 2)[1:])
    except (OSError, ValueError, IndexError):
        return None
    return min(found, default=None)


def _left_in_groups(mount: Path, controllers: str, path: str) -> Iterator[int]:
    """Bytes left in a control group and in those above it."""
    if controllers == "":
        top, limit, usage, cache = mount, "memory.max", "memory.current", "inactive_file "
    elif "memory" in controllers.split(","):
        top, limit, usage, cache = (
            mount / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file ",
        )
    else:
        return
    group = top / path.lstrip("/")
    for folder in (group, *group.parents):
        if (folder / limit).is_file() and (most := (folder / limit).read_text().strip()) != "max":
            stat = (folder / "memory.stat").read_text().splitlines()
            cached = sum(int(line.split()[1]) for line in stat if line.startswith(cache))
            yield max(int(most) - int((folder / usage).read_text()) + cached, 0)
        if folder == top:
            return


def amount(size: int) -> str:
    """Format a number of bytes, such as ``1.2 GB``; 1 kB is 1000 bytes."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:,.1f} {unit}"
    return f"{size} bytes"
