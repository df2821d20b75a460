import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Save, Stop, fit, tiny_digits, tiny_mcn, tiny_pcnn, tiny_trainer

from pcnn_lightning import StageSwitch
from pcnn_lightning.callbacks.drawing import layers_of
from pcnn_lightning.callbacks.flip_ratio import FlipRatio, draw_flips, pack, shares, unpack

FILES = {"flips.csv", "flips.png"}
LAYERS = [f"features.stage{index}.0.conv" for index in (1, 2, 3)]
STILL = {"eta1": 0.0, "eta2": 0.0}


class KeepKernels(Callback):
    """Record the quantized kernels before the first epoch and at the end of each."""

    def __init__(self):
        self.epochs = []

    def on_train_start(self, trainer, pl_module):
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        layers = layers_of(pl_module)
        self.epochs.append({name: layer.quantized_weight().clone() for name, layer in layers.items()})

    def flips(self, epoch, name):
        before, after = self.epochs[epoch][name].flatten().tolist(), self.epochs[epoch + 1][name].flatten().tolist()
        return sum((x > 0, x < 0) != (y > 0, y < 0) for x, y in zip(before, after, strict=True)) / len(after)


class Flip(Callback):
    """Negate the first ``counts[i]`` elements of C in layer i at the end of each epoch."""

    def __init__(self, *counts):
        self.counts = counts

    def on_train_epoch_end(self, trainer, pl_module):
        for layer, count in zip(layers_of(pl_module).values(), self.counts, strict=True):
            layer.weight.data.view(-1)[:count].neg_()


@pytest.mark.parametrize("length", [0, 1, 3, 4, 9, 72])
def test_signs_survive_packing(length):
    signs = torch.randint(-1, 2, (length,), dtype=torch.int8)
    packed = pack(signs)
    assert packed.dtype == torch.uint8
    assert len(packed) == (length + 3) // 4
    assert torch.equal(unpack(packed)[:length], signs)


def test_shares_are_of_elements_not_of_layers():
    found = shares(
        {"stem": 1, "stage1.0.conv": 2, "stage1.1.conv": 0}, {"stem": 2, "stage1.0.conv": 4, "stage1.1.conv": 12}
    )
    assert found == {"total": 3 / 18, "stem": 0.5, "stage1": 2 / 16, "stage1.0.conv": 0.5, "stage1.1.conv": 0.0}


def test_flips_made_by_hand_are_counted():
    flips, model = FlipRatio(), tiny_pcnn(**STILL)
    fit(model, max_epochs=2, callbacks=[Flip(3, 0, 8), flips])
    sizes = [layer.weight.numel() for layer in model.one_bit_layers.values()]
    expected = [3 / sizes[0], 0.0, 8 / sizes[2]]  # each element of C is a sign in each of the J kernels
    for row in flips.epochs:
        assert [row["flips"][name] for name in LAYERS] == pytest.approx(expected)
        assert [row["flips"][f"features.stage{index}"] for index in (1, 2, 3)] == pytest.approx(expected)
        assert row["flips"]["total"] == pytest.approx(11 / sum(sizes))
        assert row["zeros"] == {}


def test_at_the_switch_every_zero_is_a_flip():
    flips, keep = FlipRatio(), KeepKernels()
    fit(tiny_pcnn(stage="ternary", **STILL), max_epochs=3, callbacks=[StageSwitch(2), keep, flips])
    ternary = keep.epochs[0]
    zeros = {name: (kernels == 0).float().mean().item() for name, kernels in ternary.items()}
    assert 0 < min(zeros.values()) <= max(zeros.values()) < 1
    assert [row["flips"]["total"] for row in flips.epochs[:2]] == [0.0, 0.0]
    for row in flips.epochs[:2]:
        assert {name: row["zeros"][name] for name in LAYERS} == pytest.approx(zeros)
    assert {name: flips.epochs[2]["flips"][name] for name in LAYERS} == pytest.approx(zeros)
    assert flips.epochs[2]["flips"]["total"] == flips.epochs[1]["zeros"]["total"]
    assert flips.epochs[2]["zeros"] == {}


@pytest.mark.parametrize("family", ["PCNN", "MCN"])
def test_flips_are_in_tensorboard_a_table_and_a_picture(tmp_path, family):
    model = tiny_pcnn(stage="ternary") if family == "PCNN" else tiny_mcn()
    logger, keep = TensorBoardLogger(tmp_path, name="run"), KeepKernels()
    fit(model, max_epochs=3, callbacks=[StageSwitch(2), keep, FlipRatio()], logger=logger)

    events = EventAccumulator(logger.log_dir).Reload()
    with Path(logger.log_dir, "flips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in layers_of(model):
        expected = [keep.flips(epoch, name) for epoch in range(3)]
        assert [event.value for event in events.Scalars(f"flips/{name}")] == pytest.approx(expected)
        assert [float(row["flips"]) for row in rows if row["layer"] == name] == pytest.approx(expected)
    steps = [event.step for event in events.Scalars("train/loss")]
    assert [event.step for event in events.Scalars("flips/total")] == steps
    zeros = [row["zeros"] != "" for row in rows if row["layer"] == "total"]
    if family == "PCNN":
        assert [event.step for event in events.Scalars("zeros/total")] == steps[:2]
        assert zeros == [True, True, False]
    else:
        assert not any(tag.startswith("zeros/") for tag in events.Tags()["scalars"])
        assert "flips/features.stem" in events.Tags()["scalars"]
        assert zeros == [False] * 3
    assert events.Images("flips")[-1].step == 11, "the last batch"
    assert Path(logger.log_dir, "flips.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_run_continues_its_record(monkeypatch):
    monkeypatch.setattr(FlipRatio, "show", lambda *_: None)  # the slowest part

    def run(*more, **arguments):
        torch.manual_seed(0)
        flips = FlipRatio()
        model = tiny_pcnn(stage="ternary", reinit_projection=True)
        fit(model, max_epochs=4, callbacks=[StageSwitch(2), flips, *more], **arguments)
        return flips.epochs

    whole = run()
    assert min(row["flips"]["total"] for row in whole) > 0
    for batches in (6, 9):  # 4 per epoch, the switch is at 8
        with pytest.raises(RuntimeError, match="killed"):
            run(Save(), Stop(batches))
        for point in ("epoch", "validation", "batch") if batches == 6 else ("batch",):
            assert run(ckpt_path=f"{point}.ckpt") == whole, (batches, point)


def test_second_run_starts_a_new_record():
    flips = FlipRatio()
    for _ in range(2):
        fit(tiny_pcnn(**STILL), callbacks=[flips])
    assert [(row["epoch"], row["flips"]["total"]) for row in flips.epochs] == [(0, 0.0)]


def test_second_run_in_fast_dev_run_keeps_the_files_of_the_first(tmp_path):
    flips = FlipRatio()
    fit(tiny_pcnn(), callbacks=[flips])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == FILES
    fit(tiny_pcnn(), callbacks=[flips], fast_dev_run=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_continued_trainer_continues_its_record():
    flips = FlipRatio()
    model, trainer = tiny_pcnn(), tiny_trainer(callbacks=[flips])
    for trainer.fit_loop.max_epochs in (1, 2):
        trainer.fit(model, datamodule=tiny_digits())
    assert [row["epoch"] for row in flips.epochs] == [0, 1]


def test_resuming_a_checkpoint_without_flips(tmp_path):
    keep = ModelCheckpoint(tmp_path, "end")
    fit(tiny_pcnn(), max_epochs=1, callbacks=[keep], enable_checkpointing=True)
    flips = FlipRatio()
    fit(tiny_pcnn(), max_epochs=2, callbacks=[flips], ckpt_path=str(tmp_path / "end.ckpt"))
    assert [row["epoch"] for row in flips.epochs] == [1]
    assert flips.epochs[0]["flips"]["total"] < 0.2


def test_aborted_run_keeps_its_files(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_pcnn(), max_epochs=3, callbacks=[FlipRatio(), Stop(6)])
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.parametrize(("model", "trainer"), [({"full_precision": True}, {}), ({}, {"fast_dev_run": True})])
def test_no_files_without_one_bit_layers_or_in_fast_dev_run(tmp_path, model, trainer):
    flips = FlipRatio()
    fit(tiny_pcnn(**model), callbacks=[flips], **trainer)
    assert not flips.epochs
    assert not list(tmp_path.iterdir())


def test_the_figure_draws_layers_the_total_and_the_switch():
    rows = [
        {"epoch": epoch, "stage": stage, "flips": shares({"stem": 1, "stage1.0": 0, "stage1.1": 2}, sizes), "zeros": {}}
        for sizes in [{"stem": 4, "stage1.0": 4, "stage1.1": 4}]
        for epoch, stage in enumerate(["ternary", "ternary", "binary"])
    ]
    axes = draw_flips(rows).axes[0]
    lines = [list(line.get_ydata()) for line in axes.lines]
    assert lines[:4] == [[25.0] * 3, [0.0] * 3, [50.0] * 3, [25.0] * 3]
    assert len(lines) == 5, "three layers, the total, and the line of the switch"
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("ternary", 1.5), ("binary", 1.5)]
