"""The best checkpoint of each stage and the record of a run."""

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import PROGRESSIVE, Decline, Stop, fit, tiny_digits, tiny_pcnn, tiny_trainer

from pcnn_lightning import PCNN, StageCheckpoint, StageSwitch, checkpoints
from pcnn_lightning.callbacks.stage_checkpoint import best_checkpoint
from pcnn_lightning.errors import InputError


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


def progressive(folder, *more, **arguments):
    """A run of six epochs of four batches, binary from the third on."""
    callbacks = [StageSwitch(2), StageCheckpoint(str(folder)), *more]
    torch.manual_seed(0)
    model = tiny_pcnn(**PROGRESSIVE, eta1=0.2)
    return fit(model, **{"max_epochs": 6, "callbacks": callbacks, "enable_checkpointing": True, **arguments})


def read_record(folder):
    return json.loads((folder / "stages.json").read_text())


@pytest.mark.parametrize("every", [2, 4])
def test_last_is_the_last_epoch_though_it_is_not_validated(tmp_path, every):
    progressive(tmp_path, check_val_every_n_epoch=every, max_epochs=5)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5 * 4
    stages = read_record(tmp_path)
    validated = {"ternary": every == 2, "binary": True}
    assert {stage: best["value"] is not None for stage, best in stages.items()} == validated
    assert {stage: best["epoch"] for stage, best in stages.items()} == {"ternary": 1, "binary": 3}


@pytest.mark.parametrize("arguments", [{"check_val_every_n_epoch": 2}, {"val_check_interval": 2}, {}])
@pytest.mark.parametrize("updates", [9, 17])
def test_a_run_killed_within_an_epoch_ends_with_the_same_record_and_files(tmp_path, arguments, updates):
    progressive(tmp_path / "whole", **arguments)
    with pytest.raises(RuntimeError, match="killed"):
        progressive(tmp_path / "kept", Stop(updates), **arguments)
    progressive(tmp_path / "kept", **arguments, ckpt_path=str(tmp_path / "kept" / "last.ckpt"))
    assert read_record(tmp_path / "kept") == read_record(tmp_path / "whole")
    for name in ("ternary.ckpt", "binary.ckpt", "last.ckpt"):
        one, other = (torch.load(tmp_path / run / name, weights_only=True) for run in ("kept", "whole"))
        assert one["epoch"] == other["epoch"]
        for key, value in one["state_dict"].items():
            assert torch.equal(value, other["state_dict"][key]), (name, key)


@pytest.mark.parametrize(
    ("written", "times"),
    [("ternary.ckpt", 1), ("binary.ckpt", 1), ("binary.ckpt", 2), ("stages.json", 2), ("last.ckpt", 6)],
)
def test_a_run_killed_between_two_files_ends_with_the_same_record_and_files(tmp_path, monkeypatch, written, times):
    def write_and_die(path, content):
        write(path, content)
        if path.name == written and path.exists():
            seen.append(path)
            if len(seen) == times:
                raise RuntimeError("killed")

    progressive(tmp_path / "whole")
    seen, write = [], checkpoints.write_whole
    with monkeypatch.context() as patch:
        for module in ("checkpoints", "callbacks.stage_checkpoint"):
            patch.setattr(f"pcnn_lightning.{module}.write_whole", write_and_die)
        with pytest.raises(RuntimeError, match="killed"):
            progressive(tmp_path / "kept")
    last = tmp_path / "kept" / "last.ckpt"
    if not last.exists():  # killed in the first epoch: nothing to go on from, and the user begins anew
        (tmp_path / "kept" / "stages.json").unlink(missing_ok=True)
    progressive(tmp_path / "kept", ckpt_path=str(last) if last.exists() else None)
    assert read_record(tmp_path / "kept") == read_record(tmp_path / "whole")
    assert {file.name for file in (tmp_path / "kept").iterdir()} == {
        file.name for file in (tmp_path / "whole").iterdir()
    }
    for stage, best in read_record(tmp_path / "kept").items():
        found = torch.load(tmp_path / "kept" / best["checkpoint"], weights_only=True)
        assert (found["one_bit"]["stage"], found["epoch"]) == (stage, best["epoch"])


def test_the_best_validation_within_an_epoch_is_kept(tmp_path):
    class Accuracy(Callback):
        """Log an accuracy that is highest at step 6, amid the second epoch."""

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("val/peak", 1.0 - abs(trainer.global_step - 6) / 100)

    keep = StageCheckpoint(str(tmp_path), monitor="val/peak")
    model = tiny_pcnn()
    fit(model, callbacks=[keep, Accuracy()], enable_checkpointing=True, max_epochs=3, val_check_interval=2)
    assert torch.load(tmp_path / "binary.ckpt", weights_only=True)["global_step"] == 6
    assert read_record(tmp_path) == {"binary": {"value": 1.0, "epoch": 1, "checkpoint": "binary.ckpt"}}


def test_a_metric_that_is_not_logged_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot watch val/top, which is not logged; there is .*val/accuracy"):
        fit(tiny_pcnn(), callbacks=[StageCheckpoint(str(tmp_path), "val/top")], enable_checkpointing=True)


def test_not_a_number_is_never_the_best(tmp_path):
    class Accuracy(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("val/odd", (math.nan, 0.5, math.nan, 0.4)[trainer.current_epoch])

    keep = StageCheckpoint(str(tmp_path), monitor="val/odd")
    fit(tiny_pcnn(), callbacks=[keep, Accuracy()], enable_checkpointing=True, max_epochs=4)
    assert read_record(tmp_path) == {"binary": {"value": 0.5, "epoch": 1, "checkpoint": "binary.ckpt"}}


def test_the_folder_of_another_run_is_refused(tmp_path):
    progressive(tmp_path / "kept", max_epochs=3)
    before = contents(tmp_path / "kept")
    with pytest.raises(InputError, match="kept holds the checkpoints of another run: choose another dirpath"):
        progressive(tmp_path / "kept")
    progressive(tmp_path / "other", max_epochs=3)
    with pytest.raises(InputError, match="kept holds the checkpoints of another run"):
        progressive(tmp_path / "kept", ckpt_path=str(tmp_path / "other" / "last.ckpt"))
    assert contents(tmp_path / "kept") == before


def test_a_run_goes_on_in_a_folder_that_was_moved(tmp_path):
    progressive(tmp_path / "whole")
    progressive(tmp_path / "old", max_epochs=6, max_steps=17)
    (tmp_path / "old").rename(tmp_path / "new")
    progressive(tmp_path / "new", ckpt_path=str(tmp_path / "new" / "last.ckpt"))
    assert list(read_record(tmp_path / "new")) == ["ternary", "binary"]
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        file.name for file in (tmp_path / "whole").iterdir()
    }
    assert not (tmp_path / "old").exists()


def test_a_second_fit_of_the_same_trainer_continues_the_record(tmp_path):
    keep, model = StageCheckpoint(str(tmp_path)), tiny_pcnn()
    trainer = fit(model, callbacks=[keep], enable_checkpointing=True, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=tiny_digits())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    "text",
    [
        *("[1]", '{"binary": 5}', '{"binary": {}}', '{"binary": {"checkpoint": 5}}', "5", "{}", "[" * 100000, "\xff"),
        *('{"binary": {"checkpoint": "../x.ckpt"}}', '{"other": {"checkpoint": "x.ckpt"}}', '{"binary": '),
    ],
)
def test_a_record_of_another_shape_is_refused(tmp_path, text):
    (tmp_path / "stages.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"stages\.json is damaged"):
        best_checkpoint(tmp_path)


def test_there_is_no_saving_amid_an_epoch_by_steps():
    with pytest.raises(TypeError, match="every_n_train_steps"):
        StageCheckpoint(every_n_train_steps=2)


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
    assert best_checkpoint(tmp_path / "kept") == tmp_path / "kept" / "binary.ckpt"


def test_sanity_check_does_not_change_the_record(tmp_path):
    callbacks = [StageSwitch(1), StageCheckpoint(str(tmp_path / "kept"))]
    fit(tiny_pcnn(**PROGRESSIVE), max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    before = contents(tmp_path / "kept")
    with pytest.raises(RuntimeError, match="killed"):
        fit(
            tiny_pcnn(**PROGRESSIVE),
            max_epochs=2,
            callbacks=[StageSwitch(1), StageCheckpoint(str(tmp_path / "kept")), Stop(4)],
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


def test_a_remote_folder_of_checkpoints_is_refused():
    with pytest.raises(ValueError, match="dirpath must be a local folder, but got s3://b/x"):
        StageCheckpoint("s3://b/x")


def test_best_of_each_stage_is_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    keep = StageCheckpoint(str(tmp_path / "kept"))
    callbacks = [StageSwitch(1), keep]
    fit(tiny_pcnn(stage="ternary"), max_epochs=2, logger=logger, callbacks=callbacks, enable_checkpointing=True)
    events = EventAccumulator(logger.log_dir).Reload()
    found = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("best/")}
    assert found == {f"best/{stage}": pytest.approx(best["value"]) for stage, best in keep.stages.items()}
    assert list(found) == ["best/ternary", "best/binary"]
