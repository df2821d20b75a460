"""Text in columns."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells in columns, the first of which is set flush left and all others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"<{widths[0]}", *(f">{width}" for width in widths[1:])]
    return ["  ".join(map(format, row, formats)) for row in rows]
