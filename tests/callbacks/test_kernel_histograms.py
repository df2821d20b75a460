import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Save, Stop, fit, tiny_mcn, tiny_pcnn

from pcnn_lightning import StageSwitch
from pcnn_lightning.callbacks.drawing import layers_of
from pcnn_lightning.callbacks.kernel_histograms import (
    KernelHistograms,
    count,
    draw_kernels,
    draw_kernels_over_epochs,
    edges,
    statistics,
)
from pcnn_lightning.errors import DivergedError

FILES = {"kernels.csv", "kernels_last.png", "kernels_over_epochs.png"}
PROGRESSIVE = {"stage": "ternary", "schedule": "cosine", "projection_loss_weight": 1e-2}


class KeepKernels(Callback):
    """Record C of each layer at the end of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        layers = layers_of(pl_module)
        self.epochs.append({name: layer.weight.detach().numpy().copy() for name, layer in layers.items()})


def read(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def a_histogram(epoch=0, stage="binary", **others):
    return {
        "epoch": epoch,
        "stage": stage,
        "layer": "features.stage1.0.conv",
        "mean_abs": 0.5,
        "std_abs": 0.1,
        "limit": 2.0,
        "counts": [1, 2, 4, 1],
        **others,
    }


# Statistics.


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (5, 1, 1, 1)])
def test_statistics_are_those_of_numpy_and_scipy(shape):
    weight = torch.distributions.Gamma(2.0, 1.0).sample(shape) - 1.5
    mean, mean_abs, std_abs, bimodality, limit = statistics(weight).tolist()
    values = weight.double().numpy().ravel()
    assert mean == pytest.approx(values.mean(), abs=1e-6)
    assert mean_abs == pytest.approx(np.abs(values).mean())
    assert std_abs == pytest.approx(np.abs(values).std())
    assert bimodality == pytest.approx((stats.skew(values) ** 2 + 1) / stats.kurtosis(values, fisher=False), rel=1e-4)
    assert limit == pytest.approx(np.abs(values).max())


@pytest.mark.parametrize(
    ("values", "bimodality"),
    [
        (stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000), 1 / 3),
        (np.linspace(-1, 1, 100_001), 5 / 9),
        (np.repeat([-0.3, 0.3], 500), 1),
        (np.repeat([-0.3, 0.3, 0.3], 500), 1),
    ],
    ids=["Gaussian", "uniform", "two points", "two unequal points"],
)
def test_bimodality_of_known_distributions(values, bimodality):
    assert statistics(torch.tensor(values, dtype=torch.float32))[3].item() == pytest.approx(bimodality, rel=1e-3)


@pytest.mark.parametrize("bins", [2, 7, 64])
def test_counts_are_those_of_numpy(bins):
    weight = torch.randn(16, 8, 3, 3, dtype=torch.float64)
    limit = weight.abs().max().item()
    expected, borders = np.histogram(weight.numpy(), bins, range=(-limit, limit))
    assert count(weight, limit, bins).tolist() == expected.tolist()
    assert edges(limit, bins) == pytest.approx(borders.tolist(), abs=1e-12)


def test_both_ends_are_counted():
    assert count(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), 2.0, 4).tolist() == [1, 1, 1, 2]


# Records of a run.


@pytest.mark.parametrize("family", ["PCNN", "MCN"])
def test_each_layer_is_in_tensorboard_and_a_table(tmp_path, family):
    model = tiny_pcnn(**PROGRESSIVE) if family == "PCNN" else tiny_mcn()
    logger, kernels = TensorBoardLogger(tmp_path, name="run"), KeepKernels()
    callbacks = [StageSwitch(2), KernelHistograms(bins=16), kernels]
    fit(model, max_epochs=3, callbacks=callbacks, logger=logger)

    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "images": 0}).Reload()
    rows = read(Path(logger.log_dir, "kernels.csv"))
    names = list(layers_of(model))
    assert names[0] == ("features.stage1.0.conv" if family == "PCNN" else "features.stem")
    assert [(int(row["epoch"]), row["layer"]) for row in rows] == [(e, name) for e in range(3) for name in names]
    stages = ["ternary", "ternary", "binary"] if family == "PCNN" else ["binary"] * 3
    assert [row["stage"] for row in rows[:: len(names)]] == stages
    for name in names:
        weights = [epoch[name].astype(np.float64) for epoch in kernels.epochs]
        of_layer = [row for row in rows if row["layer"] == name]
        for statistic, function in {
            "mean": np.mean,
            "mean_abs": lambda weight: np.abs(weight).mean(),
            "std_abs": lambda weight: np.abs(weight).std(),
            "bimodality": lambda weight: (stats.skew(weight, None) ** 2 + 1) / stats.kurtosis(weight, None, False),
        }.items():
            expected = pytest.approx([function(weight) for weight in weights], rel=1e-3, abs=1e-6)
            assert [float(row[statistic]) for row in of_layer] == expected
            scalars = events.Scalars(f"kernels/{name}/{statistic}")
            assert [event.value for event in scalars] == expected
            assert [event.step for event in scalars] == [event.step for event in events.Scalars("train/loss")]
        for epoch, (event, weight) in enumerate(zip(events.Histograms(f"kernels/{name}"), weights, strict=True)):
            shown = event.histogram_value
            assert event.step == 4 * epoch + 3, "the last batch of the epoch, as for scalars"
            assert shown.num == sum(shown.bucket) == weight.size
            assert shown.sum == pytest.approx(weight.sum(), rel=1e-4, abs=1e-4)
            assert shown.sum_squares == pytest.approx((weight**2).sum(), rel=1e-4)
            limit = np.abs(weight).max()
            counts = np.histogram(weight, 16, range=(-limit, limit))[0]
            assert np.abs(np.cumsum(shown.bucket[1:]) - np.cumsum(counts)).max() <= 1, "ties at borders may differ"
    shown = {name: [event.step for event in events.Images(name)] for name in ("kernels_last", "kernels_over_epochs")}
    assert shown == dict.fromkeys(shown, [7, 11] if family == "PCNN" else [11]), "at the end of each stage"
    assert {path.name for path in Path(logger.log_dir).iterdir()} >= FILES


def test_only_some_epochs_are_recorded():
    quick = {"limit_train_batches": 1, "limit_val_batches": 0}
    histograms = KernelHistograms(every_n_epochs=4)
    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=8, callbacks=[StageSwitch(2), histograms], **quick)
    assert [row["epoch"] for row in histograms.histograms] == [0, 1, 4, 7], "the last of each stage, too"
    histograms = KernelHistograms(every_n_epochs=4)
    fit(tiny_pcnn(), max_epochs=9, max_steps=3, callbacks=[histograms], **quick)
    assert [row["epoch"] for row in histograms.histograms] == [0, 2]


def test_resumed_run_continues_its_record(monkeypatch):
    monkeypatch.setattr(KernelHistograms, "show", lambda *_: None)  # the slowest part

    def run(*more, **arguments):
        torch.manual_seed(0)
        histograms = KernelHistograms()
        callbacks = [StageSwitch(2), histograms, *more]
        fit(tiny_pcnn(**PROGRESSIVE), max_epochs=3, callbacks=callbacks, **arguments)
        return histograms

    whole = run()
    with pytest.raises(RuntimeError, match="killed"):
        run(Save(), Stop(6))
    for point in ("epoch", "validation", "batch"):
        resumed = run(ckpt_path=f"{point}.ckpt")
        assert resumed.rows == whole.rows, point
        assert resumed.histograms == whole.histograms, point


def test_second_run_starts_a_new_record():
    histograms = KernelHistograms()
    for _ in range(2):
        fit(tiny_pcnn(), callbacks=[histograms])
    assert [row["epoch"] for row in histograms.rows] == [0, 0, 0], "an epoch of three layers"
    assert [row["epoch"] for row in histograms.histograms] == [0]


def test_aborted_run_keeps_its_files(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_pcnn(), max_epochs=3, callbacks=[KernelHistograms(), Stop(6)])
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert {row["epoch"] for row in read("kernels.csv")} == {"0"}


def test_divergence_is_left_to_the_module():
    class Ruin(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for layer in layers_of(pl_module).values():
                layer.weight.data.fill_(float("nan"))

    with pytest.raises(DivergedError):
        fit(tiny_pcnn(), max_epochs=2, callbacks=[Ruin(), KernelHistograms()])


@pytest.mark.parametrize(("model", "trainer"), [({"full_precision": True}, {}), ({}, {"fast_dev_run": True})])
def test_no_files_without_one_bit_layers_or_in_fast_dev_run(tmp_path, model, trainer):
    histograms = KernelHistograms()
    fit(tiny_pcnn(**model), callbacks=[histograms], **trainer)
    assert not histograms.rows
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="every_n_epochs must be an integer of at least 1, but got 0"):
        KernelHistograms(every_n_epochs=0)
    with pytest.raises(ValueError, match="bins must be an integer of at least 2, but got 1"):
        KernelHistograms(bins=1)


# The figures.


def test_the_figure_is_a_density_with_the_mean_marked():
    (axes,) = draw_kernels(a_histogram()).axes
    (bars,) = axes.patches
    assert bars.get_data().values == pytest.approx([0.125, 0.25, 0.5, 0.125])
    assert bars.get_data().edges == pytest.approx([-2, -1, 0, 1, 2])
    assert [line.get_xdata()[0] for line in axes.lines] == [-0.5, 0.5]
    assert axes.get_title("left") == "features.stage1.0.conv, epoch 0, binary"


@pytest.mark.parametrize("recorded", [1, 2, 6, 7, 100])
def test_up_to_six_epochs_are_drawn_from_first_to_last(recorded):
    figure = draw_kernels_over_epochs([a_histogram(epoch) for epoch in range(recorded)])
    drawn = [int(axes.texts[0].get_text().split()[1]) for axes in figure.axes]
    assert len(drawn) == min(recorded, 6)
    assert (drawn[0], drawn[-1]) == (0, recorded - 1)
    assert all(before < after for before, after in pairwise(drawn))
    for axes in figure.axes:
        assert axes.get_xlim() == figure.axes[0].get_xlim()


def test_layers_are_named_by_their_place_in_the_network():
    model, names = tiny_pcnn(), [f"features.stage{index}.0.conv" for index in (1, 2, 3)]
    assert list(layers_of(model)) == names
    assert list(layers_of(model.net)) == names
