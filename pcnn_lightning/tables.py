"""Text tables."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines of aligned columns; the first column is flush left, all others are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"<{widths[0]}", *(f">{width}" for width in widths[1:])]
    return ["  ".join(map(format, row, formats)) for row in rows]
