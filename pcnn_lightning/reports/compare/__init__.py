"""Comparison of runs: their curves in one figure, their best epochs in one table, averaged over seeds."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pcnn_lightning.errors import InputError
from pcnn_lightning.files import check_writable, write_whole
from pcnn_lightning.reports.compare.drawing import STYLES, draw_groups
from pcnn_lightning.reports.compare.groups import SEED, Group, group_runs
from pcnn_lightning.reports.compare.runs import read_runs
from pcnn_lightning.reports.compare.settings import read_published, shown
from pcnn_lightning.reports.compare.tables import ResultTable

FORMATS = ("table", "csv", "markdown")


def compare(
    runs: Sequence[str | Path],
    output: str | Path = "comparison.png",
    metric: str = "accuracy",
    over: str | None = SEED,
    format: str = "table",
    published: str | Path | None = None,
) -> str:
    """Plot the curves of several runs in one figure and return their best epochs as a table.

    Args:
        runs: folders of runs, such as ``runs/digits/version_0``. Of a folder that contains runs, the newest is taken;
            of one with ``sweep.yaml``, all runs of the sweep.
        output: file to write the figure to, in the format of its suffix; PNG if it has none.
        metric: the metric to compare, recorded as ``train/...`` and ``val/...``. Higher is better if its name contains
            ``accuracy``, otherwise lower.
        over: runs that differ in this setting only are averaged; none if it is None.
        format: ``table``, ``markdown``, or ``csv``, which has exact numbers; accuracies are in per cent.
        published: YAML file of published accuracies by the label of a row, for a column of their own.

    Raises:
        InputError: if a folder holds no such run, a file is damaged, or the figure cannot be written.
    """
    if not runs:
        raise InputError("no runs to compare: name at least one folder of logs")
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, but got {format}")
    if published is not None and metric != "accuracy":
        raise InputError(f"published numbers are of the metric accuracy, but got {metric}")
    numbers = {} if published is None else read_published(Path(published))
    read = [read_runs(Path(run), metric) for run in runs]
    found, waiting = [run for begun, _ in read for run in begun], sum(count for _, count in read)
    for folder, times in Counter(run.folder.resolve() for run in found).items():
        if times > 1:
            raise InputError(f"{folder} is named {times} times: name each run's own version_N")
    groups = group_runs(found, over)
    if len(groups) <= len(STYLES):
        _write_picture(groups, metric, Path(output))
    # A sweep over seeds is a table of groups from its first run on.
    averaged = any(len(group.runs) > 1 or (group.runs[0].sweep and over in group.runs[0].settings) for group in groups)
    results = ResultTable(groups, metric, averaged, numbers)
    notes = []
    if averaged:
        partial = "; (k) marks values of k runs, not n" if results.is_partial else ""
        notes.append(f"mean ± sample standard deviation over {over}{partial}")
        if devices := dict.fromkeys(device for group in groups for device in group.devices):
            notes.append(f"device{'s' * (len(devices) > 1)}: {'; '.join(devices)}")
    if len(groups) > len(STYLES):
        notes.append(f"no picture: {len(groups)} curves cannot be told apart, but {len(STYLES)} can")
    if waiting:
        notes.append(f"{waiting} of {waiting + len(found)} runs {'has' if waiting == 1 else 'have'} not begun")
    if numbers:
        matched = any(group.label in numbers for group in groups)
        notes.append(
            f"published: of the networks and lengths in {published}, not of these runs"
            if matched
            else f"no run is labeled as one of {published}: {'; '.join(numbers)}"
        )
    results.notes = [shown(note) for note in notes]
    return {"table": results.to_text, "csv": results.to_csv, "markdown": results.to_markdown}[format]()


def _write_picture(groups: Sequence[Group], metric: str, output: Path) -> None:
    check_writable(output.parent)
    image = io.BytesIO()
    try:
        draw_groups(groups, metric).savefig(image, format=output.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # an unknown image format
        raise InputError(f"cannot write {output}: {error}") from error
    write_whole(output, image.getbuffer())
