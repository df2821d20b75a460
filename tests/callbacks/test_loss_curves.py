"""Loss curves in TensorBoard, a table and a picture."""

import csv
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import PROGRESSIVE, Stop, fit, tiny_digits, tiny_pcnn, tiny_trainer

from pcnn_lightning import LossCurves, StageCheckpoint, StageSwitch
from pcnn_lightning.callbacks.loss_curves import draw_losses
from pcnn_lightning.errors import InputError
from pcnn_lightning.losses import CenterLoss, CrossEntropy


def test_loss_curves_of_a_second_run_begin_anew():
    curves = LossCurves()
    for _ in range(2):
        fit(tiny_pcnn(), callbacks=[curves])
    assert [row["epoch"] for row in curves.epochs] == [0]


def test_an_epoch_without_validation_has_no_validation_losses():
    curves = LossCurves()
    fit(tiny_pcnn(), max_epochs=4, callbacks=[curves], check_val_every_n_epoch=2)
    assert ["val/cross_entropy" in row for row in curves.epochs] == [False, True, False, True]


def test_an_error_before_training_is_not_hidden():
    with pytest.raises(InputError, match="the model's is binary"):
        fit(tiny_pcnn(), max_epochs=3, callbacks=[StageSwitch(1), LossCurves()])


def test_loss_curves_are_in_tensorboard_a_table_and_a_picture(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=3, callbacks=[StageSwitch(2), LossCurves()], logger=logger)
    losses = ("cross_entropy", "projection_loss", "center_loss", "loss", "accuracy")
    names = {f"{split}/{loss}" for split in ("train", "val") for loss in losses}

    events = EventAccumulator(logger.log_dir).Reload()
    assert names <= set(events.Tags()["scalars"])

    with Path(logger.log_dir, "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["ternary", "ternary", "binary"]
    for name in names:
        scalars = [event.value for event in events.Scalars(name)]
        assert [float(row[name]) for row in rows] == pytest.approx(scalars)
    with Path(logger.log_dir, "losses.png").open("rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_loss_curves_survive_a_broken_run(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_pcnn(), max_epochs=3, callbacks=[LossCurves(), Stop(6)], logger=logger)
    with Path(logger.log_dir, "losses.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 1


def test_the_picture_marks_the_switch():
    rows = [
        {
            "epoch": epoch,
            "stage": stage,
            "train/cross_entropy": 1.0,
            "val/cross_entropy": 1.1,
            "train/center_loss": 0.1,
            "train/accuracy": 0.5 + epoch / 10,
            "val/accuracy": 0.5,
        }
        for epoch, stage in enumerate(["ternary", "ternary", "binary"])
    ]
    terms = {"cross_entropy": CrossEntropy(), "center_loss": CenterLoss(10, 2, 1.0)}
    figure = draw_losses(rows, terms)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "cross-entropy\n(nats)",
        "center loss\n(weighted)",
        "accuracy\n(%)",
    ]
    assert [[line.get_label() for line in axes.lines][:-1] for axes in figure.axes] == [
        ["training", "validation"],
        ["training"],
        ["training", "validation"],
    ]
    for axes in figure.axes:
        assert set(axes.lines[-1].get_xdata()) == {1.5}, "the switch is marked in each panel"
    texts = figure.axes[0].texts
    assert [(text.get_text(), text.get_ha()) for text in texts] == [("ternary", "right"), ("binary", "left")]
    assert list(figure.axes[2].lines[0].get_ydata()) == [50, 60, 70]
    figure = draw_losses(rows, {"cross_entropy": CrossEntropy(weight=0.5)})
    assert figure.axes[0].get_ylabel() == "cross-entropy\n(nats, training × 0.5)"


def test_the_table_grows_with_every_epoch_and_the_figure_every_few(tmp_path, monkeypatch):
    seen = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with Path("losses.csv").open(newline="") as file:
                seen.append((len(list(csv.DictReader(file))), Path("losses.png").exists()))

    monkeypatch.chdir(tmp_path)
    trainer = {"max_epochs": 3, "default_root_dir": tmp_path}
    fit(tiny_pcnn(), callbacks=[LossCurves(every_n_epochs=2), Look()], **trainer)
    assert seen == [(1, False), (2, True), (3, True)]


def test_tests_of_the_run_leave_the_metrics_of_each_checkpoint(tmp_path):
    logger, data = TensorBoardLogger(tmp_path, name="run"), tiny_digits()
    trainer = tiny_trainer(logger=logger, callbacks=[LossCurves(), StageSwitch(1)], max_epochs=2)
    model = tiny_pcnn(stage="ternary")
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint("last.ckpt")
    found = {}
    for path in (None, "last.ckpt", "last.ckpt"):
        (found[str(path)],) = trainer.test(model, datamodule=data, ckpt_path=path, weights_only=True)
    with Path(logger.log_dir, "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["checkpoint"]).name, row["stage"]) for row in rows] == [
        ("None", "binary"),
        ("last.ckpt", "binary"),
    ]
    for row, metrics in zip(rows, found.values(), strict=True):
        assert {name: float(row[name]) for name in metrics} == pytest.approx(metrics)


def test_the_times_of_a_resumed_run_are_of_each_epoch_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def times():
        with Path("times.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    fit(tiny_pcnn(), max_epochs=3, callbacks=[LossCurves(), StageCheckpoint("kept")], enable_checkpointing=True)
    first = times()
    assert [row["epoch"] for row in first] == ["0", "1", "2"]
    assert all(float(row["seconds"]) > 0 and row["device"].startswith("CPU, ") for row in first)
    resumed = [LossCurves(), StageCheckpoint("kept")]
    fit(tiny_pcnn(), max_epochs=5, callbacks=resumed, enable_checkpointing=True, ckpt_path="kept/last.ckpt")
    again = times()
    assert [row["epoch"] for row in again] == ["0", "1", "2", "3", "4"]
    assert again[:3] == first
