"""Text tables fit the terminal, and nothing in them is cut."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from pcnn_lightning.tables import NARROWEST, filled, terminal_width, text_table

ROWS = [["layer", "bits\n1-bit", "kB"], ["features.0.conv", "1,234", "-"], ["head", "-", "5"], ["total", "1,234", "5"]]


def test_a_table():
    assert text_table(ROWS[:-1]).splitlines() == [
        "                  bits",
        "layer            1-bit  kB",
        "──────────────────────────",
        "features.0.conv  1,234   -",
        "head                 -   5",
    ]
    assert text_table(ROWS, total=True, gap=1, width=80).splitlines()[2:] == [
        "────────────────────────",
        "features.0.conv 1,234  -",
        "head                -  5",
        "────────────────────────",
        "total           1,234  5",
    ]


def test_a_narrow_terminal_folds_names_and_keeps_numbers():
    assert text_table(ROWS[:-1], width=10).splitlines()[3:] == [
        "features.0.c  1,234   -",
        "onv",
        "head              -   5",
    ]


TEXT = st.text("ab[]:.é界 ", max_size=60)


@given(
    rows=st.lists(st.tuples(TEXT, st.integers(0, 10**12), st.integers(0, 99)), min_size=1), width=st.integers(1, 200)
)
def test_names_fold_and_numbers_stay_whole(rows, width):
    shown = text_table([["", "#", "%"], *([name, f"{one:,}", str(two)] for name, one, two in rows)], width=width)
    numbers = 2 + max(len(f"{one:,}") for _, one, _ in rows) + 2 + max(len(str(two)) for *_, two in rows)
    assert max(map(cell_len, shown.splitlines())) <= max(width, NARROWEST + numbers)
    _, body = shown.split("─\n", 1)
    kept = [char for char in body if not (char.isdigit() or char in ", \n")]
    assert kept == [char for name, *_ in rows for char in name if char != " "]
    last = [line.split()[-2:] for line in body.splitlines() if line[-1:].isdigit()]
    assert last == [[f"{one:,}", str(two)] for _, one, two in rows]


def test_lines_break_at_spaces(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert filled("against full-precision twins\nand more") == "against\nfull-precision twins\nand more"


def test_without_a_terminal_there_are_80_columns():
    code = "from pcnn_lightning.tables import terminal_width; print(terminal_width())"
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": True}
    where = {**environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=where, **streams).stdout == "80\n"
    assert subprocess.run([sys.executable, "-c", code], env={**where, "COLUMNS": "132"}, **streams).stdout == "132\n"


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_the_width_is_that_of_the_terminal(columns, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        monkeypatch.setattr("rich.console._STD_STREAMS", (slave,))
        assert terminal_width() == columns
    finally:
        os.close(master)
        os.close(slave)


def test_colors_are_for_terminals(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert "\x1b" not in text_table(ROWS)
