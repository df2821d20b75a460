"""What the charts of TensorBoard hold, read back by TensorBoard itself."""

from pathlib import Path
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tiny import PROGRESSIVE, fit, tiny_digits, tiny_mcn, tiny_pcnn, tiny_trainer

from pcnn_lightning import (
    Diversity,
    FilterCurves,
    FlipRatio,
    GradientNorms,
    KernelHistograms,
    LossCurves,
    StageCheckpoint,
    StageSwitch,
)
from pcnn_lightning.loggers import StageLogger

RECORDERS = (LossCurves, KernelHistograms, FlipRatio, FilterCurves, Diversity, GradientNorms)


class Keep(Callback):
    """Keep the metrics at the end of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def read(folder):
    """Sub-runs of a run, with what TensorBoard reads of each."""
    folders = sorted({path.parent for path in Path(folder).rglob("*tfevents*")})
    return {
        path.relative_to(folder).as_posix(): EventAccumulator(str(path), {"images": 0}).Reload() for path in folders
    }


def curve(events, tag):
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.fixture(scope="module")
def progressive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progressive")
    logger, keep = StageLogger(folder), Keep()
    callbacks = [StageSwitch(2), keep, StageCheckpoint(), *(recorder() for recorder in RECORDERS)]
    trainer = tiny_trainer(
        max_epochs=3, logger=logger, callbacks=callbacks, enable_checkpointing=True, log_every_n_steps=2
    )
    trainer.fit(tiny_pcnn(**PROGRESSIVE), datamodule=tiny_digits())
    tested = trainer.test(ckpt_path="best", datamodule=tiny_digits(), weights_only=True)[0]
    return read(logger.log_dir), keep.epochs, tested, callbacks[2].stages


def test_training_and_validation_share_charts_and_stages_are_apart(progressive):
    runs, epochs, _, _ = progressive
    assert set(runs) == {"ternary/train", "ternary/val", "binary/train", "binary/val", "results"}
    charts = {
        "cross_entropy": "1_cross_entropy",
        "projection_loss": "2_projection_loss",
        "center_loss": "3_center_loss",
        "accuracy": "4_accuracy",
        "loss": "7_loss",
    }
    for stage, first, last in (("ternary", 0, 2), ("binary", 2, 3)):
        for split in ("train", "val"):
            for name, chart in charts.items():
                expected = {4 * epoch + 3: epochs[epoch][f"{split}/{name}"] for epoch in range(first, last)}
                found = curve(runs[f"{stage}/{split}"], f"convergence/{chart}")
                assert found == {step: pytest.approx(value) for step, value in expected.items()}, (split, name)
        others = {tag for tag in runs[f"{stage}/train"].Tags()["scalars"] if tag.startswith("convergence")}
        rates = {"5_lr_kernels", "5_lr_projections", "6_stage"}
        assert others == {f"convergence/{name}" for name in (*charts.values(), *rates)}


def test_everything_is_drawn_against_batches(progressive):
    runs, *_ = progressive
    for run, events in runs.items():
        tags = events.Tags()
        steps = {
            event.step for tag in tags["scalars"] for event in events.Scalars(tag) if not tag.startswith("results/test")
        }
        steps |= {event.step for tag in tags["histograms"] for event in events.Histograms(tag)}
        steps |= {event.step for tag in tags["images"] for event in events.Images(tag)}
        assert steps <= set(range(12)), run
        if run != "results":
            assert max(steps) == (7 if run.startswith("ternary") else 11)


def test_the_other_charts_are_those_of_the_recorders(progressive):
    runs, *_ = progressive
    tags = {tag.split("/")[0] for run in runs.values() for tag in run.Tags()["scalars"]}
    assert tags == {"convergence", "kernels", "flips", "zeros", "filters", "diversity", "gradient_norm", "results"}
    figures = {"losses", "kernels_last", "kernels_over_epochs", "flips", "filters", "diversity"}
    assert set(runs["results"].Tags()["images"]) == figures


def test_best_and_test_metrics_are_beside_the_hyperparameters(progressive):
    runs, _, tested, stages = progressive
    results = runs["results"]
    for stage, best in stages.items():
        assert list(curve(results, f"results/best_{stage}").values())[-1] == pytest.approx(best["value"])
    for name, value in tested.items():
        assert list(curve(results, f"results/{name.replace('/', '_')}").values()) == [pytest.approx(value)]
    content = results.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams["batch_size"].number_value == 16
    assert hparams["epochs"].number_value == 3
    assert hparams["model"].string_value == "PCNN"
    assert hparams["data"].string_value == "Digits"
    assert hparams["projection_loss_weight"].number_value == 1e-3
    assert hparams["widths"].string_value == "[2, 2, 2, 2]"
    # Without a description of the experiment, TensorBoard puts those first in which runs differ.
    assert metadata.EXPERIMENT_TAG not in results.summary_metadata


def test_the_seed_is_a_hyperparameter(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    logger = StageLogger(tmp_path)
    fit(tiny_mcn(), logger=logger)
    runs = read(logger.log_dir)
    content = runs["results"].SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    assert metadata.parse_session_start_info_plugin_data(content).hparams["seed"].string_value == "7"
    assert set(runs) == {"binary/train", "binary/val", "results"}
    assert "convergence/2_filter_loss" in runs["binary/val"].Tags()["scalars"]


def test_the_sum_of_a_single_term_is_not_drawn_again(tmp_path):
    logger = StageLogger(tmp_path)
    fit(tiny_pcnn(full_precision=True), logger=logger)
    tags = read(logger.log_dir)["full_precision/train"].Tags()["scalars"]
    assert "convergence/1_cross_entropy" in tags
    assert "convergence/7_loss" not in tags


def test_a_validation_alone_is_a_result(tmp_path):
    logger = StageLogger(tmp_path)
    trainer = tiny_trainer(logger=logger)
    found = trainer.validate(tiny_pcnn(), datamodule=tiny_digits())[0]
    runs = read(logger.log_dir)
    assert set(runs) == {"results"}
    assert list(curve(runs["results"], "results/val_accuracy").values()) == [pytest.approx(found["val/accuracy"])]


def test_figures_go_to_the_loggers_that_take_them(tmp_path):
    wandb = create_autospec(WandbLogger, instance=True, save_dir=str(tmp_path), version="a", root_dir=str(tmp_path))
    mlflow = create_autospec(MLFlowLogger, instance=True, save_dir=str(tmp_path), version="b", run_id="b")
    mlflow.experiment = Mock()
    for logger in (wandb, mlflow):
        logger.name = "runs"
    fit(tiny_pcnn(), callbacks=[LossCurves(), FlipRatio()], logger=[wandb, mlflow], enable_checkpointing=False)
    assert {call.args[0] for call in wandb.log_image.call_args_list} == {"losses", "flips"}
    for call in wandb.log_image.call_args_list:
        name, images, step = call.args
        (written,) = tmp_path.rglob(f"{name}.png")
        assert np.array_equal(np.asarray(images[0]), np.asarray(Image.open(written)))
        assert step == 3
    sent = {call.args for call in mlflow.experiment.log_artifact.call_args_list}
    assert {(run, Path(path).name) for run, path in sent} == {("b", "losses.png"), ("b", "flips.png")}
