"""A line an epoch."""

import re

import pytest
from tiny import PROGRESSIVE, fit, tiny_mcn, tiny_pcnn

from pcnn_lightning import StageSwitch
from pcnn_lightning.callbacks import EpochLines, LossCurves


def lines_of(capsys, *callbacks, model, **arguments):
    fit(model, callbacks=[EpochLines(), *callbacks], **arguments)
    return capsys.readouterr().out.splitlines()


def test_a_line_an_epoch_says_where_a_run_is(capsys):
    curves = LossCurves()
    model = tiny_pcnn(stage="ternary", projection_loss_weight=0.1)
    header, *lines = lines_of(capsys, StageSwitch(2), curves, model=model, max_epochs=3)
    assert header.split() == ["epoch", "stage", "CE", "projection", "accuracy", "η₁/η₂", "s", "left"]
    assert len(lines) == 3
    assert {len(line) for line in (header, *lines)} == {80 - len(" center")}
    for number, (line, row) in enumerate(zip(lines, curves.epochs, strict=True), 1):
        place, stage, *values = line.split()
        assert (place, stage) == (f"{number}/3", row["stage"])
        losses = ("train/cross_entropy", "val/cross_entropy", "train/projection_loss")
        assert [float(value) for value in values[:3]] == pytest.approx([row[name] for name in losses], abs=6e-4)
        assert 0 <= float(values[3]) <= 1
        assert values[5] == "5e-2/1e-2"
        assert re.fullmatch(r"\d:\d\d:\d\d", values[-1])
    assert lines[-1].endswith("0:00:00")


def test_terms_that_begin_later_get_a_new_header(capsys):
    model = tiny_mcn(center_loss_weight=1e-3, center_loss_start=1, filter_loss_weight=0.1)
    lines = lines_of(capsys, model=model, max_epochs=3)
    assert ["center" in line for line in lines if "epoch" in line] == [False, True]
    assert len(lines) == 5


@pytest.mark.parametrize(("columns", "rates"), [(79, []), (80, ["η₁/η₂"])])
def test_learning_rates_are_left_out_where_they_have_no_room(capsys, monkeypatch, columns, rates):
    monkeypatch.setenv("COLUMNS", str(columns))
    model = tiny_pcnn(center_loss_weight=1e-3, projection_loss_weight=0.1)
    header, line = lines_of(capsys, model=model)
    assert header.split() == ["epoch", "stage", "CE", "projection", "center", "accuracy", *rates, "s", "left"]
    assert len(header) == len(line) == (80 if rates else 80 - len(" 5e-2/1e-2"))


def test_a_run_without_an_end_and_without_validation(capsys):
    header, line = lines_of(capsys, model=tiny_pcnn(), max_epochs=-1, max_steps=4, limit_val_batches=0)
    assert "left" not in header
    assert line.split()[0] == "1"
    assert len(line.split()) == len(header.split())


def test_the_first_epoch_after_a_resume_is_timed_from_its_start(capsys, tmp_path):
    trainer = fit(tiny_pcnn(**PROGRESSIVE), max_steps=2, max_epochs=-1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    lines = lines_of(capsys, model=tiny_pcnn(**PROGRESSIVE), max_epochs=2, ckpt_path=str(tmp_path / "x.ckpt"))
    assert all(float(line.split()[-2]) < 100 for line in lines[1:])
