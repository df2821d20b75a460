"""The best checkpoint of each stage and the record of a run."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import PROGRESSIVE, Decline, Stop, fit, tiny_digits, tiny_pcnn, tiny_trainer

from pcnn_lightning import PCNN, StageCheckpoint, StageSwitch


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


def test_validation_does_not_change_the_record(tmp_path):
    callbacks = [StageSwitch(1), StageCheckpoint(str(tmp_path / "kept"))]
    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    before = contents(tmp_path / "kept")
    keep = StageCheckpoint(str(tmp_path / "kept"))
    trainer = tiny_trainer(callbacks=[keep], enable_checkpointing=True)
    trainer.validate(tiny_pcnn(**PROGRESSIVE), datamodule=tiny_digits(), ckpt_path=tmp_path / "kept" / "ternary.ckpt")
    assert contents(tmp_path / "kept") == before
    assert keep.best_checkpoint() == str(tmp_path / "kept" / "binary.ckpt")


def test_sanity_check_does_not_change_the_record(tmp_path):
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


def test_best_checkpoint_of_another_folder_is_not_restored(tmp_path):
    old, new = StageCheckpoint(str(tmp_path / "old")), StageCheckpoint(str(tmp_path / "new"))
    old.best_model_path, old.stages = str(tmp_path / "old" / "binary.ckpt"), {"binary": {"value": 0.5}}
    new.load_state_dict(old.state_dict())
    assert (new.best_model_path, new.stages) == ("", {})


def test_a_remote_folder_of_checkpoints_is_refused():
    with pytest.raises(ValueError, match="dirpath must be a local folder, but got s3://b/x"):
        StageCheckpoint("s3://b/x")


def test_best_of_each_stage_is_logged_with_the_hyperparameters(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    keep = StageCheckpoint(str(tmp_path / "kept"))
    callbacks = [StageSwitch(1), keep]
    fit(tiny_pcnn(stage="ternary"), max_epochs=2, logger=logger, callbacks=callbacks, enable_checkpointing=True)
    events = EventAccumulator(logger.log_dir).Reload()
    found = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("best/")}
    assert found == {f"best/{stage}": pytest.approx(best["value"]) for stage, best in keep.stages.items()}
    assert list(found) == ["best/ternary", "best/binary"]
    assert any("hparams" in tag for tag in events.summary_metadata)
