"""Text tables that fit the terminal."""

import io
import textwrap
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

NARROWEST = 12
"""Minimum width of a table's first column, in columns of the terminal; a narrower one keeps its own width."""


def terminal_width() -> int:
    """Columns of the terminal; ``COLUMNS`` if it is set, and 80 where there is no terminal."""
    return Console(force_jupyter=False).width


def filled(text: str) -> str:
    """Break lines at spaces, so that none is wider than the terminal."""
    width = max(terminal_width(), 1)
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.splitlines())


def text_table(rows: Sequence[Sequence[str]], *, total: bool = False, gap: int = 2, width: int | None = None) -> str:
    """Format rows as aligned columns.

    The first column is flush left, and folded where the table would be too wide; all others are flush right. No cell
    is cut: where the other columns alone are too wide, so is the table. A cell may have several lines.

    Args:
        rows: the header and the rows.
        total: whether the last row is a total.
        gap: spaces between columns.
        width: columns of the terminal; by default those of the present one.
    """
    header, *body = rows
    lines = max(cell.count("\n") for cell in header)
    footer = body.pop() if total else [""] * len(header)
    table = Table(box=box.SIMPLE, show_edge=False, show_footer=total, pad_edge=False, padding=(0, gap - 1, 0, 0))
    widths = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True)]
    for at, (name, sum_) in enumerate(zip(header, footer, strict=True)):
        bottom = "\n" * (lines - name.count("\n")) + name
        table.add_column(bottom, sum_, justify="right" if at else "left", overflow="fold", no_wrap=at > 0)
    for row in body:
        table.add_row(*row)
    least = min(widths[0], NARROWEST) + sum(gap + width for width in widths[1:])
    console = Console(
        file=io.StringIO(),
        width=max(width or terminal_width(), least),
        color_system=None,
        force_jupyter=False,
        markup=False,
        emoji=False,
        highlight=False,
    )
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds, such as 0:14:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
