"""Measurements and reports of benchmarks.

Contenders take turns within one run, so that other load on the machine affects them alike.
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

from pcnn_lightning.devices import device_name
from pcnn_lightning.errors import InputError
from pcnn_lightning.tables import filled, text_table


class Stopwatch:
    """Marks the ends of phases; on a GPU with events on its stream, so that nothing waits until the times are read.

    On a GPU, a phase lasts from the last kernel of the previous phase to its own last one: a phase that copies a batch
    takes as long as the device waits for it.

    Args:
        device: device to time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a round of phases."""
        self._mark(None)

    def mark(self, phase: str) -> None:
        """End ``phase``, which began at the previous mark."""
        self._mark(phase)

    def read(self) -> dict[str, list[float]]:
        """Return the milliseconds of each round, by phase."""
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
    """Medians of the measurements. The first contender is the reference of the others.

    Attributes:
        title: what was measured, where and how.
        images: images per round.
        milliseconds: by contender and phase; if there are several phases, the last entry is ``step``, their total.
        megabytes: peak memory of a round, by contender; empty if not measured.
        speed_ups: by contender, the median over rounds of the reference's time divided by its own: above 1 is faster.
        loader: images per second that data loading alone achieves; None if no data are read.
    """

    title: str
    images: int
    milliseconds: dict[str, dict[str, float]]
    megabytes: dict[str, float]
    speed_ups: dict[str, float]
    loader: float | None = None

    def table(self) -> str:
        """Format a column per contender; a row per contender if there is only one phase."""
        contenders = list(self.milliseconds)
        phases = list(self.milliseconds[contenders[0]])
        rows = [["", *contenders]]
        rows += [[f"{phase}, ms", *(f"{times[phase]:.2f}" for times in self.milliseconds.values())] for phase in phases]
        rates = (1000 * self.images / times[phases[-1]] for times in self.milliseconds.values())
        rows.append(["images/s", *(f"{rate:,.0f}" for rate in rates)])
        if self.megabytes:
            rows.append(["peak memory, MB", *(f"{self.megabytes[name]:,.1f}" for name in contenders)])
        rows.append(["speed-up", *(f"{self.speed_ups[name]:.2f}" for name in contenders)])
        words = [f"speed-up over {contenders[0]}: above 1 is faster"]
        if self.loader is not None:
            name, times = list(self.milliseconds.items())[-1]
            words.append(f"waiting for data: {times['data'] / times[phases[-1]]:.1%} of the {phases[-1]} of {name}")
            words.append(f"data alone: {self.loader:,.0f} images/s")
        table = text_table(rows if len(phases) > 1 else list(zip(*rows, strict=True)))
        return "\n".join([filled(self.title), "", table, "", *map(filled, words)])


Round = Callable[[Stopwatch], None]
"""Runs what is timed once, from ``start`` to the last ``mark``."""


PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precisions of a Trainer that can be timed, and their autocast dtypes."""


@dataclass(frozen=True)
class Setting:
    """Where and how to time.

    Attributes:
        device: device to run on.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``, as for a Trainer.
        compiled: whether to compile the contenders.
        channels_last: whether to use channels-last tensors.
        rounds: number of timed rounds of each contender.
        warmup: number of untimed rounds before them.

    Raises:
        InputError: if a number is too small, or the precision is not supported.
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
        """Memory format of images and kernels."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> AbstractContextManager[None]:
        """Context manager for a forward pass."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def __str__(self) -> str:
        how = [self.precision, *["compiled"] * self.compiled, *["channels last"] * self.channels_last]
        return f"{', '.join(how)}, {device_name(self.device)}; medians of {self.rounds}"


def compare_rounds(
    title: str, images: int, contenders: Mapping[str, Round], setting: Setting, *, memory: bool = True
) -> Report:
    """Time ``contenders`` in turns.

    Args:
        title: title of the report.
        images: images per round.
        contenders: what to time, by name; the first one is the reference of speed-ups.
        setting: where and how to time.
        memory: whether to measure the peak memory of a round.
    """
    device = setting.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream records the marks
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
    speed_ups = {
        name: median(one / own for one, own in zip(first, total, strict=True)) for name, total in totals.items()
    }
    return Report(f"{title}, {setting}", images, medians, megabytes, speed_ups)


def peak_megabytes(contend: Round, device: torch.device) -> float:
    """Peak memory of one round on top of what is allocated before it, in MB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contend(Stopwatch(device))
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's report of a missing GPU
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
