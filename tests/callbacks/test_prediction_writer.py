"""Predictions as CSV."""

import csv
from types import SimpleNamespace

import pytest
import torch
from tiny import fit, tiny_digits, tiny_pcnn, tiny_trainer

from pcnn_lightning import PredictionWriter
from pcnn_lightning.errors import InputError


def write_one(path, name="a.png", label="a"):
    data = SimpleNamespace(predict_names=lambda: [name], classes=[label])
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, datamodule=data)
    batch = {"label": torch.tensor([0]), "probability": torch.tensor([0.5])}
    PredictionWriter(str(path)).write_on_epoch_end(trainer, None, [batch], [[[0]]])


def test_predictions_are_written_in_order(tmp_path):
    model, data = tiny_pcnn(), tiny_digits()
    fit(model, data)
    tiny_trainer(callbacks=[PredictionWriter(str(tmp_path / "new" / "p.csv"))]).predict(model, datamodule=data)
    with (tmp_path / "new" / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images, _ = zip(*(data.on_after_batch_transfer(raw, 0) for raw in data.test_dataloader()), strict=True)
    with torch.no_grad():
        probabilities, labels = model.eval()(torch.cat(images)).softmax(1).max(1)
    assert [row["image"] for row in rows] == [str(index) for index in range(len(labels))]
    assert [row["label"] for row in rows] == [data.classes[label] for label in labels]
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_names_that_are_not_utf8_are_escaped(tmp_path, capsys):
    path = tmp_path / "caf\udce9.csv"
    write_one(path, "caf\udce9.png", "\udcff, ß")
    assert path.read_bytes().decode() == 'image,label,probability\r\ncaf\\udce9.png,"\\udcff, ß",0.500000\r\n'
    assert capsys.readouterr().out.encode().endswith(b"caf\\udce9.csv\n")


def test_predictions_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    (tmp_path / "p.csv").write_text("what was there before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"p\.csv cannot be written \(No space left on device\)"):
        write_one(tmp_path / "p.csv")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["what was there before"]
