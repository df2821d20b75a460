import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Stop, fit, tiny_digits, tiny_mcn, tiny_pcnn, tiny_trainer
from torch import nn

from pcnn_lightning.callbacks import filter_curves
from pcnn_lightning.callbacks.drawing import choose_layers
from pcnn_lightning.callbacks.filter_curves import FilterCurves, draw_filters
from pcnn_lightning.errors import InputError

MODELS = {
    "PCNN": lambda: tiny_pcnn(widths=[4, 4, 4, 4], projections=4),
    "MCN": tiny_mcn,
    "MCN-1": lambda: tiny_mcn(average=True),
}


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch):
    """Skip the drawing, which is slower than these runs."""
    monkeypatch.setattr(filter_curves, "draw_filters", lambda *_: Figure((1, 1)))


class Watch(Callback):
    """Record the filters of a layer before training and after every step, from the state dict."""

    def __init__(self, name="features.stem.modulation", read=torch.abs):
        self.name, self.read, self.seen = f"net.{name}", read, {}

    def on_train_start(self, trainer, pl_module):
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(trainer, pl_module)

    def look(self, trainer, pl_module):
        self.seen[trainer.global_step] = self.read(pl_module.state_dict()[self.name].clone())


def table(path="filters.csv"):
    """Values by step and by (plane, row, column)."""
    found = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            place = tuple(int(row[name]) for name in ("plane", "row", "column"))
            found.setdefault(int(row["step"]), {})[place] = float(row["value"])
    return found


def elements(filters):
    return {
        (plane, row, column): pytest.approx(value.item(), rel=1e-6)
        for plane, rows in enumerate(filters)
        for row, columns in enumerate(rows)
        for column, value in enumerate(columns)
    }


@pytest.mark.parametrize(
    ("model", "name", "read"),
    [
        ("PCNN", "features.stage1.0.conv.projection", lambda w: w),
        ("MCN", "features.stem.modulation", torch.abs),
        ("MCN-1", "features.stem.modulation", lambda m: torch.tensor([[[plane.abs().mean()]] for plane in m])),
    ],
)
def test_every_element_is_recorded(model, name, read):
    watch = Watch(name, read)
    fit(MODELS[model](), max_epochs=2, callbacks=[watch, FilterCurves(every_n_steps=3)])
    assert table() == {step: elements(watch.seen[step]) for step in (0, 3, 6, 8)}


def test_a_run_leaves_its_figure(monkeypatch):
    monkeypatch.setattr(filter_curves, "draw_filters", draw_filters)
    fit(MODELS["PCNN"](), callbacks=[FilterCurves(every_n_steps=1)])
    assert Path("filters.png").read_bytes().startswith(b"\x89PNG")


def test_default_interval_is_log_every_n_steps():
    curves = FilterCurves()
    fit(tiny_mcn(), max_epochs=2, callbacks=[curves], log_every_n_steps=4)
    assert curves.steps == [0, 4, 8]


def test_a_step_of_several_batches_is_recorded_once_and_as_it_ended():
    watch = Watch()
    fit(tiny_mcn(accumulate=2), max_epochs=2, callbacks=[watch, FilterCurves(every_n_steps=1)])
    assert table() == {step: elements(watch.seen[step]) for step in range(5)}


def test_a_long_run_is_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(filter_curves, "MOST_POINTS", 3)
    watch, curves = Watch(), FilterCurves(every_n_steps=1)
    fit(tiny_mcn(), max_epochs=4, limit_train_batches=3, callbacks=[watch, curves], limit_val_batches=0)
    assert table() == {step: elements(watch.seen[step]) for step in (0, 4, 8, 12)}


def test_memory_is_bounded_within_an_epoch(monkeypatch):
    monkeypatch.setattr(filter_curves, "MOST_POINTS", 3)
    waiting = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            waiting.append(len(curves._waiting))

    curves = FilterCurves(every_n_steps=1)
    fit(tiny_mcn(), callbacks=[curves, Count()], limit_val_batches=0)
    assert max(waiting) <= 3
    assert curves.steps == [0, 2, 4]


@pytest.mark.parametrize("model", MODELS)
def test_tensorboard_has_mean_and_deviation_of_each_plane(tmp_path, model):
    logger = TensorBoardLogger(tmp_path, name="run")
    curves = FilterCurves(every_n_steps=2)
    fit(MODELS[model](), max_epochs=2, callbacks=[curves], logger=logger)
    layer = "features.stage1.0.conv" if model == "PCNN" else "features.stem"
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    for plane, values in enumerate(curves.values[layer].double().flatten(2).unbind(1)):
        means = values.sum(1) / values.shape[1]
        deviations = ((values - means[:, None]).square().sum(1) / values.shape[1]).sqrt()
        for name, expected in (("mean", means), ("std", deviations)):
            scalars = events.Scalars(f"filters/{layer}/plane{plane}/{name}")
            assert [scalar.step for scalar in scalars] == [1, 3, 5, 7]  # batches, as loggers count them
            assert [scalar.value for scalar in scalars] == pytest.approx(expected[1:].tolist(), abs=1e-6)
    assert events.Tags()["images"] == ["filters"]
    assert Path(logger.log_dir, "filters.csv").exists()


@pytest.mark.parametrize("steps", [4, 6, 7])  # 4 an epoch
def test_a_resumed_run_continues_its_curves(tmp_path, steps):
    def run(folder, *more, **arguments):
        torch.manual_seed(0)
        curves = FilterCurves(every_n_steps=2)
        kept = ModelCheckpoint(tmp_path, "step", every_n_train_steps=1, enable_version_counter=False)
        trainer = {"default_root_dir": folder, "enable_checkpointing": True, **arguments}
        fit(tiny_mcn(), max_epochs=3, callbacks=[curves, kept, *more], **trainer)

    run("whole")
    with pytest.raises(RuntimeError, match="killed"):
        run("parts", Stop(steps))
    run("parts", ckpt_path=str(tmp_path / "step.ckpt"))
    resumed = table("parts/filters.csv")
    assert resumed == table("whole/filters.csv")
    assert list(resumed) == list(range(0, 13, 2))


def test_second_run_starts_new_curves():
    curves = FilterCurves(every_n_steps=2)
    for _ in range(2):
        fit(tiny_mcn(), max_epochs=2, callbacks=[curves])
    assert curves.steps == [0, 2, 4, 6, 8]


def test_continued_trainer_continues_its_curves():
    curves = FilterCurves(every_n_steps=2)
    model, trainer = tiny_mcn(), tiny_trainer(callbacks=[curves])
    for trainer.fit_loop.max_epochs in (1, 2):
        trainer.fit(model, datamodule=tiny_digits())
    assert curves.steps == [0, 2, 4, 6, 8]


def test_aborted_run_keeps_its_curves():
    watch = Watch()
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_mcn(), max_epochs=3, callbacks=[watch, FilterCurves(every_n_steps=2), Stop(7)])
    assert table() == {step: elements(watch.seen[step]) for step in (0, 2, 4, 6)}
    assert Path("filters.png").exists()


def test_several_layers_with_one_callback_each():
    watch = Watch("features.stage2.0.conv2.modulation")
    callbacks = [watch, FilterCurves(every_n_steps=2), FilterCurves("features.stage2.0.conv2", every_n_steps=4)]
    fit(tiny_mcn(), callbacks=callbacks)
    assert list(table()) == [0, 2, 4]
    assert table("filters_features.stage2.0.conv2.csv") == {step: elements(watch.seen[step]) for step in (0, 4)}


def test_unknown_layer_is_refused():
    message = r"no 1-bit layer stem; there are features\.stage1\.0\.conv, features\.stage2\.0\.conv, features\.stage3"
    with pytest.raises(InputError, match=message):
        fit(tiny_pcnn(), callbacks=[FilterCurves("stem")])


def test_layers_of_any_network_are_found():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), next(iter(tiny_pcnn().one_bit_layers.values()))

    assert list(choose_layers(Other(), None)) == ["second"]
    assert choose_layers(nn.Conv2d(1, 4, 3), None) == {}


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="every_n_steps must be an integer of at least 1, but got 0"):
        FilterCurves(every_n_steps=0)


@pytest.mark.parametrize(
    ("model", "trainer"),
    [(lambda: tiny_pcnn(full_precision=True), {}), (tiny_mcn, {"fast_dev_run": True})],
    ids=["without 1-bit layers", "fast_dev_run"],
)
def test_no_files_without_one_bit_layers_or_in_fast_dev_run(tmp_path, model, trainer):
    fit(model(), callbacks=[FilterCurves(every_n_steps=1)], **trainer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", MODELS)
def test_training_is_the_same_bit_for_bit(model):
    ends = []
    for callbacks in ([], [FilterCurves(every_n_steps=1)]):
        torch.manual_seed(0)
        trained = MODELS[model]()
        fit(trained, max_epochs=2, limit_train_batches=2, callbacks=callbacks)
        ends.append({**trained.state_dict(), "random state": torch.get_rng_state()})
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


# The figure.


def test_a_panel_shows_nine_elements_and_their_mean_dotted():
    values = torch.randn(5, 4, 3, 3)
    figure = draw_filters([0, 2, 4, 6, 8], ["binary"] * 5, values, "|M|", "stem")
    assert [axes.get_title() for axes in figure.axes] == ["plane 0", "plane 1", "plane 2", "plane 3"]
    for plane, axes in enumerate(figure.axes):
        *lines, mean = axes.get_lines()
        assert [line.get_ydata().tolist() for line in lines] == values[:, plane].flatten(1).T.tolist()
        assert mean.get_linestyle() == ":"
        assert mean.get_ydata().tolist() == pytest.approx(values[:, plane].flatten(1).mean(1).tolist())
        assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == 10
        assert axes.get_ylim() == figure.axes[0].get_ylim()
    assert figure.get_supxlabel() == "optimizer step"
    assert figure.get_supylabel() == "element of |M|"


@pytest.mark.parametrize(("planes", "panels"), [(1, 1), (3, 3), (16, 8)])
def test_there_are_at_most_eight_panels(planes, panels):
    figure = draw_filters([0, 1], ["binary"] * 2, torch.rand(2, planes, 1, 1), "W", "conv")
    assert len(figure.axes) == panels
    assert ("first 8 of 16" in figure.get_suptitle()) == (planes == 16)


def test_the_switch_is_marked_in_each_panel():
    stages = ["ternary", "ternary", "binary"]
    figure = draw_filters([0, 10, 20], stages, torch.rand(3, 2, 1, 1), "W", "conv")
    assert [set(axes.lines[-1].get_xdata()) for axes in figure.axes] == [{15}, {15}]
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["ternary", "binary"], []]


def test_a_pattern_names_several_layers(tmp_path):
    curves = FilterCurves("features.stage[12].*", every_n_steps=1)
    model = tiny_pcnn()
    fit(model, callbacks=[curves], default_root_dir=tmp_path)
    names = ["features.stage1.0.conv", "features.stage2.0.conv"]
    assert list(curves.values) == names
    for name in names:
        assert torch.equal(curves.values[name][-1], model.one_bit_layers[name].filters())
        assert (tmp_path / f"filters_{name}.csv").exists()
        assert (tmp_path / f"filters_{name}.png").exists()
