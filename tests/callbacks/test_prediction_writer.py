"""Predictions as CSV."""

import csv

import pytest
import torch
from tiny import fit, tiny_digits, tiny_pcnn, tiny_trainer

from pcnn_lightning import PredictionWriter


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
