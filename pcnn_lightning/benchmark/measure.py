"""What a benchmark measures by, and what it reports.

Contenders take turns within one run, so that whatever else a machine does meets them alike.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from pcnn_lightning.errors import InputError
from pcnn_lightning.tables import aligned


class Stopwatch:
    """Marks the ends of phases, on a GPU on its own time line, so that nothing waits before the times are read.

    On a GPU, the time that a phase takes is what passes between the last kernel of the phase before and its own last
    one: a phase that copies a batch has taken as long as the device has waited for it.

    Args:
        device: whose time is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a round of phases."""
        self._mark(None)

    def mark(self, phase: str) -> None:
        """End ``phase``, which began with the mark before."""
        self._mark(phase)

    def read(self) -> dict[str, list[float]]:
        """Milliseconds of each round, by phase."""
        times = defaultdict(list)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for (_, before), (phase, after) in pairwise(self._marks):
            if phase is not None and isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                times[phase].append(before.elapsed_time(after))
            elif phase is not None:
                times[phase].append(1000 * (after - before))  # type: ignore[operator]
        return times

    def _mark(self, phase: str | None) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))


@dataclass(frozen=True)
class Report:
    """Medians of what was measured.

    Attributes:
        title: what was measured, where and how.
        images: per round.
        milliseconds: by contender and phase; the last one, if there are several, is ``step``, all of them.
        megabytes: the most memory that a round took, by contender; empty where it was not looked at.
        ratios: by contender, the median over rounds of the first contender's time by this one's.
        loader: images per second that the data alone can give; None where no data are read.
    """

    title: str
    images: int
    milliseconds: dict[str, dict[str, float]]
    megabytes: dict[str, float]
    ratios: dict[str, float]
    loader: float | None = None

    def table(self) -> str:
        """Aligned columns, a row for each contender."""
        first, phases = next(iter(self.milliseconds)), list(next(iter(self.milliseconds.values())))
        memory = ["MB"] if self.megabytes else []
        rows = [["", *(f"{phase}/ms" for phase in phases), "images/s", *memory, "ratio"]]
        for name, times in self.milliseconds.items():
            cells = [f"{times[phase]:.2f}" for phase in phases]
            cells.append(f"{1000 * self.images / times[phases[-1]]:,.0f}")
            cells += [f"{self.megabytes[name]:,.1f}"] if self.megabytes else []
            rows.append([name, *cells, f"{self.ratios[name]:.2f}"])
        words = [f"ratio: {phases[-1]} of {first} by that of the row"]
        if self.loader is not None:
            times = self.milliseconds[first]
            words.append(f"waiting for data: {times['data'] / times[phases[-1]]:.1%} of the {phases[-1]} of {first}")
            words.append(f"data alone: {self.loader:,.0f} images/s")
        return "\n".join([self.title, "", *aligned(rows), "", *words])


Round = Callable[[Stopwatch], None]
"""Does what is timed once, from ``start`` to the last ``mark``."""


PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Those of a Trainer that can be timed, and what autocast makes of them."""


@dataclass(frozen=True)
class Setting:
    """Where and how something is timed.

    Attributes:
        device: where.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``, as a Trainer has it.
        compiled: whether contenders are compiled.
        channels_last: whether they work on channels-last tensors.
        rounds: how many of each contender are timed.
        warmup: how many of each go before.

    Raises:
        InputError: if a number is too small, or the precision none that is trained in.
    """

    device: torch.device
    precision: str = "32-true"
    compiled: bool = False
    channels_last: bool = False
    rounds: int = 20
    warmup: int = 5

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, but got {self.precision!r}")
        for name, least in (("rounds", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, but got {getattr(self, name)}")

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and kernels."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> AbstractContextManager[None]:
        """To be entered for a forward pass."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def __str__(self) -> str:
        gpu = self.device.type == "cuda"
        where = torch.cuda.get_device_name(self.device) if gpu else f"CPU, {torch.get_num_threads()} threads"
        how = [self.precision, *["compiled"] * self.compiled, *["channels last"] * self.channels_last]
        return f"{', '.join(how)}, {where}; medians of {self.rounds}"


def compare_rounds(
    title: str, images: int, contenders: Mapping[str, Round], setting: Setting, *, memory: bool = True
) -> Report:
    """Let ``contenders`` take turns.

    Args:
        title: what the report is to say of them.
        images: that a round works through.
        contenders: what is timed, by name.
        setting: where and how.
        memory: whether to look at the memory that a round takes.
    """
    device = setting.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream marks are made in
    for _ in range(setting.warmup):
        for contend in contenders.values():
            contend(Stopwatch(device))
    megabytes = {name: peak_megabytes(contend, device) for name, contend in contenders.items() if memory}
    watches = {name: Stopwatch(device) for name in contenders}
    for _ in range(setting.rounds):
        for name, contend in contenders.items():
            contend(watches[name])
    times = {name: watch.read() for name, watch in watches.items()}
    totals = {name: [sum(phases) for phases in zip(*of_one.values(), strict=True)] for name, of_one in times.items()}
    medians = {name: {phase: median(found) for phase, found in of_one.items()} for name, of_one in times.items()}
    for name, total in totals.items():
        if len(medians[name]) > 1:
            medians[name]["step"] = median(total)
    first = next(iter(totals.values()))
    ratios = {
        name: median(one / other for one, other in zip(first, total, strict=True)) for name, total in totals.items()
    }
    return Report(f"{title}, {setting}", images, medians, megabytes, ratios)


def peak_megabytes(contend: Round, device: torch.device) -> float:
    """The most memory that one round takes on top of what is there before it, in MB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contend(Stopwatch(device))
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report that it has found no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        contend(Stopwatch(device))
    events = sorted(
        (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    most = taken = 0
    for event in events:
        taken += event.nbytes()
        most = max(most, taken)
    return most / 1e6
