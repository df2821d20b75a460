"""Runs as ``compare`` finds them: tables and settings in folders."""

import csv
import re
from pathlib import Path

import yaml

TERNARY, BINARY = "ternary", "binary"


def write(folder, *epochs, test=None, **settings):
    """Write the tables and the settings of a run."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    losses = [{"epoch": epoch, **row} for epoch, row in enumerate(epochs)]
    for name, rows in (("losses.csv", losses), ("test.csv", [test] if test else [])):
        if rows:
            with (folder / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
                writer.writeheader()
                writer.writerows(rows)
    (folder / "hparams.yaml").write_text(yaml.dump(settings))
    return folder


def row(accuracy, stage=BINARY, train=0.5):
    losses = {"train/cross_entropy": 1.0, "val/cross_entropy": 1.5}
    return {"val/accuracy": accuracy, "train/accuracy": train, "stage": stage, **losses}


def cells(table):
    """The cells of the lines below the header."""
    _, rows = re.split(r"^─+\n", table, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in rows.splitlines()]


TWO_STAGES = [row(0.5, TERNARY), row(0.75, TERNARY), row(0.25), row(0.625, train=0.875)]
