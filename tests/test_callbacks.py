import csv
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Stop, fit, tiny_digits, tiny_pcnn, tiny_trainer

from pcnn_lightning import PCNN, LossCurves, PredictionWriter, StageCheckpoint, StageSwitch
from pcnn_lightning.callbacks import StageProgressBar
from pcnn_lightning.callbacks.loss_curves import draw_losses
from pcnn_lightning.errors import InputError

PROGRESSIVE = {"stage": "ternary", "schedule": "cosine", "projection_loss_weight": 1e-3, "center_loss_weight": 1e-3}


class Record(Callback):
    """What the network is at the start of each epoch, after the switch if there is one."""

    def __init__(self):
        self.stages, self.weights, self.momenta, self.first_rates = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.stages.append(pl_module.stage)
            self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})
            self.momenta.append(len(trainer.optimizers[0].state))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.first_rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class Still(Callback):
    """The end of each epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


# The switch.


@pytest.mark.parametrize("reinit", [False, True])
def test_the_switch_keeps_c_and_begins_anew(reinit):
    record, ends = Record(), Still()
    model = tiny_pcnn(**PROGRESSIVE, reinit_projection=reinit)
    fit(model, max_epochs=4, callbacks=[StageSwitch(2), record, ends])
    assert record.stages == ["ternary", "ternary", "binary", "binary"]
    for name, before in ends.weights[1].items():
        redrawn = reinit and name.endswith(".projection")
        assert torch.equal(before, record.weights[2][name]) != redrawn, name
    assert record.momenta == [0, len(list(model.parameters())), 0, len(list(model.parameters()))]
    half = 0.5 * 0.05 * (1 + math.cos(math.pi / 2))
    assert record.first_rates == pytest.approx([0.05, half, 0.05, half])
    for layer in model.projection_layers:
        assert len(layer.quantized_weight().unique()) == 2


@pytest.mark.parametrize(("share", "max_epochs", "ternary"), [(0.4, 5, 2), (0.5, 2, 1), (0.1, 3, 1)])
def test_the_switch_may_be_a_share_of_the_run(share, max_epochs, ternary):
    record = Record()
    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=max_epochs, callbacks=[StageSwitch(share), record], limit_train_batches=1)
    assert record.stages == ["ternary"] * ternary + ["binary"] * (max_epochs - ternary)


def test_the_first_forward_after_the_switch_is_binary():
    values = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            layer = pl_module.projection_layers[0]
            layer.register_forward_hook(lambda layer, *_: values.append(len(layer.quantized_weight().unique())))

    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=2, callbacks=[StageSwitch(1), Look()], limit_val_batches=0)
    assert values == [3] * 4 + [2] * 4


def test_a_plateau_switches_early():
    record = Record()
    model = tiny_pcnn(stage="ternary", eta1=0.0, eta2=0.0)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 0.0  # nothing learns, so validation accuracy stands still
    fit(model, max_epochs=6, callbacks=[StageSwitch(5, patience=2), record])
    assert record.stages == ["ternary"] * 3 + ["binary"] * 3


@pytest.mark.parametrize(
    ("model", "switch", "message"),
    [
        ({"stage": "binary"}, StageSwitch(1), "stage: ternary, but the model's is binary"),
        ({"full_precision": True}, StageSwitch(1), "the model's is full_precision"),
        ({"stage": "ternary"}, StageSwitch(3), "epoch 3 leaves no binary epoch: trainer.max_epochs is 3"),
        ({"stage": "ternary"}, StageSwitch(0.9), "epoch 3 leaves no binary epoch"),
        ({"stage": "ternary"}, StageSwitch(2, patience=1, monitor="val/top"), "cannot watch val/top"),
    ],
)
def test_a_switch_that_cannot_be_is_refused(model, switch, message):
    with pytest.raises(InputError, match=message):
        fit(tiny_pcnn(**model), max_epochs=3, callbacks=[switch])


def test_wrong_arguments_of_the_switch_are_named():
    for epoch in (0, -1, 1.5):
        with pytest.raises(ValueError, match=rf"a share in \(0, 1\) or a positive whole number, but got {epoch}"):
            StageSwitch(epoch)
    with pytest.raises(ValueError, match="patience must be at least 1"):
        StageSwitch(1, patience=0)


class Decline(Callback):
    """Log an accuracy that is best in the ternary stage."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/declining", 1.0 - 0.1 * trainer.current_epoch)


def test_best_is_a_binary_epoch_though_a_ternary_one_was_better(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/declining", mode="max", filename="{epoch}")
    stopping = EarlyStopping("val/declining", mode="max", patience=2)
    callbacks = [Decline(), StageSwitch(2), checkpoint, stopping]
    trainer = fit(tiny_pcnn(**PROGRESSIVE), max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
    assert checkpoint.best_model_path.endswith("epoch=2.ckpt")
    assert float(checkpoint.best_model_score) == pytest.approx(0.8)
    assert PCNN.load_from_checkpoint(checkpoint.best_model_path).stage == "binary"
    assert trainer.current_epoch == 4, "early stopping forgot nothing"


# Resuming.


@pytest.mark.parametrize("reinit", [False, True])
@pytest.mark.parametrize("batches", [2, 4, 5, 8, 10, 12, 13])  # 4 an epoch; the switch lies at 8
def test_a_resumed_run_ends_bit_equal(tmp_path, batches, reinit):
    def callbacks(folder):
        every = ModelCheckpoint(tmp_path / folder, "step", every_n_train_steps=1, enable_version_counter=False)
        return [StageSwitch(2), LossCurves(), StageCheckpoint(str(tmp_path / folder)), every]

    def run(folder, *more, **arguments):
        torch.manual_seed(arguments.pop("seed", 0))
        model, used = tiny_pcnn(**PROGRESSIVE, reinit_projection=reinit), callbacks(folder)
        data = tiny_digits(crop_padding=1)
        fit(model, data, max_epochs=4, callbacks=[*used, *more], enable_checkpointing=True, **arguments)
        return model, used

    whole, first = run("whole")
    with pytest.raises(RuntimeError, match="killed"):
        run("parts", Stop(batches))
    file = "last.ckpt" if batches % 4 == 0 else "step.ckpt"
    resumed, second = run("parts", seed=1, ckpt_path=str(tmp_path / "parts" / file))
    assert resumed.stage == "binary"
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [row["stage"] for row in second[1].epochs] == ["ternary", "ternary", "binary", "binary"]
    assert second[1].epochs == first[1].epochs
    assert second[2].stages == first[2].stages


class Ask(Callback):
    """Ask a run to end, as a cluster does, at the start of a batch."""

    def __init__(self, batch):
        self.batch, self.seen = batch, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.seen == self.batch:
            signal.raise_signal(signal.SIGTERM)
        self.seen += 1


@pytest.mark.parametrize(("accumulate", "every"), [(1, 4), (3, 4), (3, 2)])  # batches an update, and to a validation
@pytest.mark.parametrize("batch", [0, 3, 5, 7, 8, 10, 13, 15])  # 4 an epoch; the switch lies at 8
def test_a_run_that_was_asked_to_end_goes_on_bit_equal(tmp_path, batch, accumulate, every):
    def run(folder, *more, **arguments):
        torch.manual_seed(arguments.pop("seed", 0))
        eta = 0.3 if accumulate > 1 else 0.0
        model = tiny_pcnn(**PROGRESSIVE, accumulate=accumulate, eta=eta)
        used = [StageSwitch(2), LossCurves(), StageCheckpoint(str(tmp_path / folder))]
        data = tiny_digits(crop_padding=1)
        arguments |= {"max_epochs": 4, "enable_checkpointing": True, "val_check_interval": every}
        fit(model, data, callbacks=[*used, *more], **arguments)
        return model, used

    whole, first = run("whole")
    with pytest.raises(SIGTERMException):
        run("parts", Ask(batch))
    resumed, second = run("parts", seed=1, ckpt_path=str(tmp_path / "parts" / "last.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert second[1].epochs == first[1].epochs
    assert second[2].stages == first[2].stages


# What is recorded.


def test_each_stage_leaves_its_best_checkpoint_and_a_record(tmp_path, capsys):
    class Watch(Callback):
        def __init__(self):
            self.accuracies = {}

        def on_validation_end(self, trainer, pl_module):
            value = float(trainer.callback_metrics["val/accuracy"])
            self.accuracies.setdefault(pl_module.stage, {})[trainer.current_epoch] = value

    watch = Watch()
    callbacks = [StageSwitch(3), StageCheckpoint(str(tmp_path)), watch]
    fit(tiny_pcnn(**PROGRESSIVE, eta1=0.2), max_epochs=6, callbacks=callbacks, enable_checkpointing=True)
    record = json.loads((tmp_path / "stages.json").read_text())
    printed = capsys.readouterr().out
    assert list(record) == ["ternary", "binary"]
    for stage, best in record.items():
        assert best["value"] == max(watch.accuracies[stage].values())
        assert watch.accuracies[stage][best["epoch"]] == best["value"]
        assert PCNN.load_from_checkpoint(tmp_path / best["checkpoint"]).stage == stage
        assert torch.load(tmp_path / best["checkpoint"], weights_only=True)["epoch"] == best["epoch"]
        assert f"{best['value']:.4f}" in printed
    assert (tmp_path / "last.ckpt").exists()


def test_without_validation_data_the_latest_epoch_is_kept(tmp_path):
    callbacks = [StageSwitch(2), StageCheckpoint(str(tmp_path))]
    fit(
        tiny_pcnn(**PROGRESSIVE),
        tiny_digits(val_fraction=0.0),
        max_epochs=4,
        callbacks=callbacks,
        enable_checkpointing=True,
    )
    record = json.loads((tmp_path / "stages.json").read_text())
    assert [(stage, best["epoch"]) for stage, best in record.items()] == [("ternary", 1), ("binary", 3)]


def test_last_is_the_last_epoch_though_accuracy_does_not_rise(tmp_path):
    checkpoint = StageCheckpoint(str(tmp_path), monitor="val/declining")
    fit(tiny_pcnn(), max_epochs=3, callbacks=[Decline(), checkpoint], enable_checkpointing=True)
    assert torch.load(tmp_path / "binary.ckpt", weights_only=True)["epoch"] == 0
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2
    assert json.loads((tmp_path / "stages.json").read_text())["binary"]["epoch"] == 0


def test_the_record_goes_on_in_a_resumed_run_without_validation_data(tmp_path):
    def run(max_epochs, **arguments):
        callbacks = [StageSwitch(1), StageCheckpoint(str(tmp_path))]
        model, data = tiny_pcnn(**PROGRESSIVE), tiny_digits(val_fraction=0.0)
        fit(model, data, max_epochs=max_epochs, callbacks=callbacks, enable_checkpointing=True, **arguments)

    run(2)
    run(4, ckpt_path=str(tmp_path / "last.ckpt"))
    record = json.loads((tmp_path / "stages.json").read_text())
    assert [(stage, best["epoch"]) for stage, best in record.items()] == [("ternary", 0), ("binary", 3)]
    assert sorted(file.name for file in tmp_path.glob("*.ckpt")) == ["binary.ckpt", "last.ckpt", "ternary.ckpt"]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_validation_leaves_the_record_of_the_run(tmp_path):
    callbacks = [StageSwitch(1), StageCheckpoint(str(tmp_path / "kept"))]
    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    before = contents(tmp_path / "kept")
    keep = StageCheckpoint(str(tmp_path / "kept"))
    trainer = tiny_trainer(callbacks=[keep], enable_checkpointing=True)
    trainer.validate(tiny_pcnn(**PROGRESSIVE), datamodule=tiny_digits(), ckpt_path=tmp_path / "kept" / "ternary.ckpt")
    assert contents(tmp_path / "kept") == before
    assert keep.best_checkpoint() == str(tmp_path / "kept" / "binary.ckpt")


def test_a_sanity_check_leaves_the_record_of_the_run(tmp_path):
    callbacks = [StageSwitch(1), StageCheckpoint(str(tmp_path / "kept"))]
    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    before = contents(tmp_path / "kept")
    with pytest.raises(RuntimeError, match="killed"):
        fit(
            tiny_pcnn(**PROGRESSIVE),
            max_epochs=2,
            callbacks=[StageCheckpoint(str(tmp_path / "kept")), Stop(4)],
            enable_checkpointing=True,
            num_sanity_val_steps=1,
            ckpt_path=str(tmp_path / "kept" / "ternary.ckpt"),
        )
    assert contents(tmp_path / "kept") == before


@pytest.mark.parametrize("name", ["ternary.ckpt", "last.ckpt"])
def test_a_run_resumed_into_another_folder_names_only_files_that_are_there(tmp_path, name):
    def run(folder, *more, **arguments):
        keep = StageCheckpoint(str(tmp_path / folder))
        callbacks = [StageSwitch(1), keep, *more]
        fit(tiny_pcnn(**PROGRESSIVE), max_epochs=3, callbacks=callbacks, enable_checkpointing=True, **arguments)
        return keep

    with pytest.raises(RuntimeError, match="killed"):
        run("old", Stop(8))
    keep = run("new", ckpt_path=str(tmp_path / "old" / name))
    record = json.loads((tmp_path / "new" / "stages.json").read_text())
    assert list(record) == ["binary"]
    assert (tmp_path / "new" / record["binary"]["checkpoint"]).is_file()
    assert Path(keep.best_model_path).parent == tmp_path / "new"
    last = torch.load(tmp_path / "new" / "last.ckpt", weights_only=True)
    assert last["callbacks"][keep.state_key]["stages"] == record


def test_a_checkpoint_of_another_folder_is_no_best_of_this_one(tmp_path):
    old, new = StageCheckpoint(str(tmp_path / "old")), StageCheckpoint(str(tmp_path / "new"))
    old.best_model_path, old.stages = str(tmp_path / "old" / "binary.ckpt"), {"binary": {"value": 0.5}}
    new.load_state_dict(old.state_dict())
    assert (new.best_model_path, new.stages) == ("", {})


def test_a_remote_folder_of_checkpoints_is_refused():
    with pytest.raises(ValueError, match="dirpath must be a local folder, but got s3://b/x"):
        StageCheckpoint("s3://b/x")


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
    losses = ("cross_entropy", "projection_loss", "center_loss")
    names = {f"{split}/{loss}" for split in ("train", "val") for loss in losses}

    events = EventAccumulator(logger.log_dir).Reload()
    assert names <= set(events.Tags()["scalars"])
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0].decode()
    assert "projection_loss" in layout
    assert "cross_entropy" in layout

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
        {"epoch": epoch, "stage": stage, "train/cross_entropy": 1.0, "val/cross_entropy": 1.1, "train/center_loss": 0.1}
        for epoch, stage in enumerate(["ternary", "ternary", "binary"])
    ]
    axes = draw_losses(rows).axes[0]
    assert [(text.get_text(), text.get_ha()) for text in axes.texts] == [("ternary", "right"), ("binary", "left")]
    assert {text.xy[0] for text in axes.texts} == {1.5}
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["cross-entropy, training", "cross-entropy, validation", "center loss, training"]


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


# The progress bar.


def test_the_progress_bar_shows_the_stage_the_rates_and_numbers_that_nothing_waits_for():
    shown = []

    class Bar(StageProgressBar):
        def get_metrics(self, trainer, pl_module):
            shown.append(super().get_metrics(trainer, pl_module))
            return shown[-1]

    model = tiny_pcnn(stage="ternary", eta1=0.05, eta2=0.01)
    fit(
        model,
        max_epochs=2,
        callbacks=[Bar(), StageSwitch(1)],
        enable_progress_bar=True,
        log_every_n_steps=2,
    )
    assert not any(isinstance(value, torch.Tensor) for metrics in shown for value in metrics.values())
    assert "loss" not in shown[0]  # after one batch of two
    assert float(shown[1]["loss"]) > 0
    assert (shown[1]["η₁"], shown[1]["η₂"]) == ("0.05", "0.01")
    assert [metrics["stage"] for metrics in (shown[0], shown[-1])] == ["ternary", "binary"]
    assert "accuracy" in shown[-1]


def test_the_best_of_each_stage_is_with_the_hyperparameters(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    keep = StageCheckpoint(str(tmp_path / "kept"))
    callbacks = [StageSwitch(1), keep]
    fit(tiny_pcnn(stage="ternary"), max_epochs=2, logger=logger, callbacks=callbacks, enable_checkpointing=True)
    events = EventAccumulator(logger.log_dir).Reload()
    found = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("best/")}
    assert found == {f"best/{stage}": pytest.approx(best["value"]) for stage, best in keep.stages.items()}
    assert list(found) == ["best/ternary", "best/binary"]
    assert any("hparams" in tag for tag in events.summary_metadata)
