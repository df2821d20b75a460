"""The progress bar, in a terminal and where there is none."""

import io
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tiny import fit, tiny_digits, tiny_pcnn

from pcnn_lightning import StageSwitch
from pcnn_lightning.callbacks import EpochLines, StageProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch, columns=80):
    """Let what is printed go to a terminal. In a fixture, pytest would undo it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    return terminal


def screens(written):
    """The lines of the screen after each piece that is written, by the few sequences that a bar uses."""
    lines, at, found = [""], 0, []
    for piece in re.split(r"(\x1b\[[?\d;]*[A-Za-z]|\r|\n)", written):
        if piece == "\n":
            at += 1
            lines += [""] * (at + 1 - len(lines))
        elif piece == "\x1b[2K":
            lines[at] = ""
        elif match := re.fullmatch(r"\x1b\[(\d+)A", piece):
            at -= int(match[1])
        elif piece and piece != "\r" and not re.fullmatch(r"\x1b\[(\?25[lh]|[\d;]*m)", piece):
            assert "\x1b" not in piece, piece
            lines[at] += piece
        if piece not in ("", "\r"):
            found.append([line.rstrip() for line in lines])
    return found


def bars(screen):
    return [line for line in screen if "━" in line or "╸" in line]


@pytest.mark.parametrize("columns", [80, 130])
def test_a_line_below_the_lines_of_the_epochs(monkeypatch, columns):
    terminal = open_terminal(monkeypatch, columns)
    model = tiny_pcnn(stage="ternary", eta1=0.05, eta2=0.01)
    callbacks = [EpochLines(), StageProgressBar(), StageSwitch(1)]
    fit(model, max_epochs=2, callbacks=callbacks, enable_progress_bar=True, log_every_n_steps=2, num_sanity_val_steps=1)
    seen = screens(terminal.getvalue())
    shown = [bars(screen) for screen in seen]
    assert max(map(len, shown)) == 1
    lines = list(dict.fromkeys(line for screen in shown for line in screen))
    assert max(map(len, lines)) <= columns
    begun = [line for line in lines if line.startswith("epoch")]
    place = re.compile(r"epoch (1/2 ternary|2/2 (ternary|binary)|[12]/2 validation)\b")  # until the switch, ternary
    assert all(place.match(line) for line in begun)
    last = begun[-1]
    assert re.match(r"epoch 2/2 binary .* 4/4 ", last)
    assert re.search(r" loss \d\.\d{3} acc 0\.\d{3}" + (r" η₁ 0\.05 η₂ 0\.01$" if columns > 100 else "$"), last)
    header, *epochs = [line for line in seen[-1] if line]
    assert header.split()[:2] == ["epoch", "stage"]
    assert [line.split()[:2] for line in epochs] == [["1/2", "ternary"], ["2/2", "binary"]]  # and the bar is gone


def test_what_is_logged_is_above_the_bar(monkeypatch):
    terminal = open_terminal(monkeypatch)

    class Log(Callback):
        def on_train_batch_end(self, trainer, *_):
            logging.getLogger("lightning.pytorch").warning("batch %d", trainer.global_step)

    errors = Terminal()
    monkeypatch.setattr(sys, "stderr", errors)
    logger = logging.getLogger("lightning.pytorch")
    handlers = [logging.StreamHandler(errors), logging.FileHandler("log")]
    for handler in handlers:
        logger.addHandler(handler)
    try:
        fit(tiny_pcnn(), callbacks=[StageProgressBar(), Log()], enable_progress_bar=True)
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
    final = screens(terminal.getvalue())[-1]
    assert [line for line in final if line.startswith("batch")] == [f"batch {step}" for step in (1, 2, 3, 4)]
    assert not bars(final)
    assert "batch 4" in Path("log").read_text()


def test_other_passes_have_a_bar_of_their_own(monkeypatch):
    terminal, model, data = open_terminal(monkeypatch), tiny_pcnn(), tiny_digits()
    trainer = fit(model, data, callbacks=[StageProgressBar()], enable_progress_bar=True)
    before = len(terminal.getvalue())
    trainer.test(model, datamodule=data, verbose=False)
    seen = [bars(screen) for screen in screens(terminal.getvalue()[before:])]
    assert max(map(len, seen)) == 1
    assert all(line.startswith("Testing") for screen in seen for line in screen)
    assert seen[-1] == []


def test_nothing_is_drawn_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    model, data = tiny_pcnn(), tiny_digits()
    trainer = fit(model, data, callbacks=[EpochLines(), StageProgressBar()], enable_progress_bar=True)
    trainer.test(model, datamodule=data, verbose=False)
    written = capsys.readouterr().out
    assert len(written.splitlines()) == 2
    assert not set(written) & set("\r\x1b━")


def test_the_loss_is_read_at_a_rate(monkeypatch):
    """Reading a loss makes the host wait for the device."""
    open_terminal(monkeypatch)
    read = []

    class Loss(torch.Tensor):
        def __float__(self):
            read.append(1)
            return 0.5

    class Outputs(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            outputs["loss"] = outputs["loss"].as_subclass(Loss)

    callbacks = [Outputs(), StageProgressBar()]
    fit(tiny_pcnn(), max_epochs=3, callbacks=callbacks, enable_progress_bar=True, log_every_n_steps=2)
    assert len(read) == 6
