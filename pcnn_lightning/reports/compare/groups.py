"""Grouping of runs: one row of the table and one curve for runs that differ in their seed only."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pcnn_lightning.errors import InputError
from pcnn_lightning.reports.compare.runs import Run
from pcnn_lightning.reports.compare.settings import shown

SEED = "seed_everything"
LONGEST = 1000
"""Upper bound of the characters in a label, apart from its folder."""


class Sample:
    """The mean of values and their sample standard deviation.

    Attributes:
        n: the number of values.
        mean: NaN without values.
        std: with n - 1 in the denominator; NaN below two values.
        least: the smallest value.
        most: the largest one.
    """

    def __init__(self, values: Iterable[float]) -> None:
        known = sorted(values)  # so that the order of runs does not matter
        self.n = len(known)
        self.mean = sum(known) / self.n if known else math.nan
        away = math.hypot(*(value - self.mean for value in known))
        self.std = away / math.sqrt(self.n - 1) if self.n > 1 else math.nan
        self.least, self.most = (known[0], known[-1]) if known else (math.nan, math.nan)

    def __bool__(self) -> bool:
        return self.n > 0


@dataclass
class Group:
    """Runs that are one row of the table and one curve: several that differ in one setting only, or a single one."""

    runs: list[Run]
    label: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """The settings that all its runs share."""
        return {
            name: value
            for name, value in self.runs[0].settings.items()
            if all(run.settings.get(name) == value for run in self.runs)
        }

    @property
    def folder(self) -> Path:
        """The folder of the run, or the lowest one above all its runs."""
        return Path(os.path.commonpath([run.folder.resolve() for run in self.runs]))

    @property
    def stages(self) -> list[str]:
        """The stages that its runs have reached, in their order."""
        rows = sorted((row for run in self.runs for row in run.epochs), key=lambda row: int(row["epoch"]))
        return list(dict.fromkeys(row["stage"] for row in rows))

    @property
    def devices(self) -> list[str]:
        """What its runs ran on."""
        return list(dict.fromkeys(shown(device) for run in self.runs for device in run.devices))

    def curve(self, name: str) -> dict[int, Sample]:
        """The values of a metric, by those epochs that all its runs have."""
        curves = [run.curve(name) for run in self.runs]
        shared = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
        return {epoch: Sample(curve[epoch] for curve in curves) for epoch in shared}

    def changes(self) -> list[tuple[float, str]]:
        """Position of each change of stage on the epoch axis, and its label."""
        return list(dict.fromkeys(change for run in self.runs for change in run.changes()))


def group_runs(runs: Sequence[Run], over: str | None = SEED) -> list[Group]:
    """Group the runs that differ in the setting ``over`` and in nothing else, and label the groups.

    Runs in which it is not recorded, or the same, are not averaged. Runs of different sweeps are kept apart.

    Raises:
        InputError: if ``over`` is not the seed, and no run has such a setting.
    """
    known = sorted({SEED, *(name for run in runs for name in run.settings)})
    if over not in (None, *known) and str(over).rpartition(".")[2] in known:
        over = str(over).rpartition(".")[2]  # a sweep names its values so
    if over not in (None, *known):
        raise InputError(f"no run has the setting {over} to average over: {', '.join(known)} or null")
    order = {id(run): at for at, run in enumerate(runs)}
    alike: dict[object, list[Run]] = defaultdict(list)
    for run in runs:
        alike[run.sweep, frozenset(item for item in run.settings.items() if item[0] != over)].append(run)
    groups: list[Group] = []
    for members in alike.values():
        values = {run.settings[name] for run in members for name in run.settings if name == over}
        groups += [Group(members)] if len(values) == len(members) else [Group([run]) for run in members]
    groups.sort(key=lambda group: order[id(group.runs[0])])
    _label(groups, over)
    return groups


def _label(groups: Sequence[Group], over: str | None) -> None:
    """Label each group by what sets it apart, and by its folder where labels would be the same.

    In a sweep, these are the values that it gave; elsewhere the settings in which the groups differ. A setting that
    only one family has is used if it differs within that family.
    """
    values: dict[str, set[str]] = defaultdict(set)
    for group in groups:
        if group.runs[0].sweep is None:
            for name, value in group.settings.items():
                values[name].add(value)
    differ = [name for name, found in values.items() if len(found) > 1]
    for group in groups:
        settings = group.settings
        names = differ if group.runs[0].sweep is None else [name for name in settings if name != over]
        label = shown(", ".join(f"{name}={settings[name]}" for name in names if name in settings))
        group.label = label if len(label) <= LONGEST else f"{label[:LONGEST]}..."
    times = Counter(group.label for group in groups)
    common = os.path.commonpath([group.folder.parent for group in groups])
    for group in groups:
        if not group.label or times[group.label] > 1:
            folder = shown(group.folder.relative_to(common).as_posix())
            group.label = f"{group.label} ({folder})" if group.label else folder
