import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from compare_helpers import BINARY, TERNARY, TWO_STAGES, cells, row, write
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from rich.cells import cell_len
from tiny import fit, tiny_digits, tiny_pcnn

import pcnn_lightning.reports
from pcnn_lightning import LossCurves, StageSwitch
from pcnn_lightning.errors import InputError
from pcnn_lightning.reports.compare import compare as compare_runs
from pcnn_lightning.reports.compare.drawing import COLOURS, STYLES, draw_groups
from pcnn_lightning.reports.compare.groups import Group, group_runs
from pcnn_lightning.reports.compare.runs import Run, read_run
from pcnn_lightning.reports.compare.tables import ResultTable

# The table.


def test_each_stage_has_its_best_epoch():
    first = write("a", *TWO_STAGES, weight=0.0)
    second = write("b", row(0.5), row(0.5), row(0.25), weight=1e-4)
    assert compare_runs([first, second]).splitlines() == [
        "accuracy (%)",
        "",
        "                                 best     at   last   last",
        "run              stage  epochs    val  epoch    val  train",
        "──────────────────────────────────────────────────────────",
        "weight=0       ternary       2  75.00      1  75.00  50.00",
        "a               binary       2  62.50      3  62.50  87.50",
        "weight=0.0001   binary       3  50.00      0  25.00  50.00",
        "b",
    ]


def test_each_stage_has_its_last_test():
    folder = write("a", *TWO_STAGES)
    rows = ["x/binary.ckpt,binary,0.25", "x/ternary.ckpt,ternary,0.5", "x/last.ckpt,binary,0.625"]
    (folder / "test.csv").write_text("\n".join(["checkpoint,stage,test/accuracy", *rows, ""]))
    assert [row[-1] for row in cells(compare_runs([folder]))] == ["50.00", "62.50"]


def test_test_accuracy_has_a_column_if_logged():
    tested = write("a", row(0.5), test={"checkpoint": "binary.ckpt", "stage": BINARY, "test/accuracy": 0.375})
    other = write("b", row(0.5))
    table = compare_runs([tested, other])
    assert table.splitlines()[3].endswith("  test")
    assert [row[-1] for row in cells(table)] == ["37.50", "-"]
    assert "test" not in compare_runs([other])


@given(
    columns=st.integers(72, 200),
    labels=st.lists(st.text("xqz= 界", min_size=1, max_size=90), min_size=1, max_size=4),
    values=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_no_name_or_number_is_cut_to_fit(columns, labels, values):
    epochs = list(enumerate(values, 998))
    rows = [
        {"epoch": epoch, "stage": TERNARY if epoch < 1000 else BINARY, "val/accuracy": value, "train/accuracy": value}
        for epoch, value in epochs
    ]
    tests = [{"stage": BINARY, "test/accuracy": values[0]}]
    groups = [Group([Run(Path("runs") / str(at), rows, {}, tests)], label) for at, label in enumerate(labels)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        shown = ResultTable(groups).to_text()
    assert max(map(cell_len, shown.splitlines())) <= columns
    assert [char for char in shown if char in "xqz=界"] == [char for char in "".join(labels) if char != " "]
    ternary, binary = (max(pair) for pair in (values[:2], values[2:]))
    for number in (ternary, binary, values[1], values[3], values[0]):
        assert f" {100 * number:.2f}" in shown
    for group in groups:
        assert str(group.runs[0].folder) in shown


def test_lowest_loss_is_best():
    logs = [{"val/loss": value, "train/loss": 1.0, "stage": BINARY} for value in (2.0, math.nan, 0.5, 1.0)]
    shown = compare_runs([write("a", *logs)], metric="loss")
    assert shown.startswith("loss (nats)\n")
    assert cells(shown) == [["a", "binary", "4", "0.5000", "2", "1.0000", "1.0000"]]


# Labels.


def labels(*folders):
    return [group.label for group in group_runs([read_run(Path(folder)) for folder in folders])]


def test_runs_are_labelled_by_what_differs():
    write("a", row(0.5), weight=0, eta=0.1, widths=(4, 8), _instantiator="x")
    write("b", row(0.5), weight=1e-5, eta=0.1, widths=(4, 16), _instantiator="y")
    assert labels("a", "b") == ["weight=0, widths=(4, 8)", "weight=1e-05, widths=(4, 16)"]


def test_zero_is_zero_however_it_is_written():
    write("a", row(0.5), weight=0, eta=0.1)
    write("b", row(0.5), weight=0.0, eta=0.2)
    assert labels("a", "b") == ["eta=0.1", "eta=0.2"]


def test_families_share_labels_where_they_share_settings():
    for name, model, settings in (
        ("a", "PCNN", {"eta1": 0.1, "projections": 1}),
        ("b", "PCNN", {"eta1": 0.1, "projections": 4}),
        ("c", "MCN", {"eta1": 0.1, "planes": 4}),
    ):
        folder = write(name, row(0.5), **settings)
        config = {"seed_everything": 0, "model": {"class_path": f"pcnn_lightning.{model}"}, "trainer": {}}
        (folder / "config.yaml").write_text(yaml.dump(config))
    assert labels("a", "b", "c") == ["model=PCNN, projections=1", "model=PCNN, projections=4", "model=MCN"]


def test_data_length_and_seed_tell_runs_apart():
    for name, seed, size, epochs in (("a", 0, 10, 3), ("b", 1, 20, 4)):
        data = {"class_path": "pcnn_lightning.Digits", "init_args": {"train_size": size}}
        config = {"seed_everything": seed, "data": data, "trainer": {"max_epochs": epochs}}
        (write(name, row(0.5)) / "config.yaml").write_text(yaml.dump(config))
    assert labels("a", "b") == [
        "data.train_size=10, max_epochs=3, seed_everything=0",
        "data.train_size=20, max_epochs=4, seed_everything=1",
    ]


def test_equal_runs_are_labelled_by_their_folders():
    for name, weight in (("x/a", 0.5), ("x/b", 0.5), ("x/c", 1.0)):
        write(name, row(0.5), weight=weight)
    assert labels("x/a", "x/b") == ["a", "b"]
    assert labels("x/a", "x/b", "x/c") == ["weight=0.5 (a)", "weight=0.5 (b)", "weight=1"]
    assert labels("x/a") == ["a"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"- a list", b""])
def test_runs_with_damaged_settings_are_labelled_by_folder(content):
    for name in ("x/a", "y/a"):
        folder = write(name, row(0.5))
        for file in ("hparams.yaml", "config.yaml"):
            (folder / file).write_bytes(content)
    assert labels("x/a", "y/a") == ["x/a", "y/a"]


NESTED = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghij")
)
ODD = {
    "date": "x: 2024-13-45",
    "integer": "x: !!int abc",
    "digits": "x: " + "9" * 5000,
    "depth": "x: " + "[" * 5000 + "]" * 5000,
    "code": "x: !!python/name:missing.name",
    "numeric key": "5: 6",
    "null key": "null: 5",
    "long key": f"data: {{init_args: {{0x{'f' * 5000}: 6}}}}",
    "exponential key": NESTED.replace("[", "!!python/tuple [") + "? *j\n: 1",
    "exponential merge": "a: &a {x: 1}\n"
    + "".join(f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in pairwise("abcdefghij")),
    "model": "model: 5",
    "class": "model: {class_path: 5}",
    "data": "data: text",
    "no class": "data: {class_path: null}",
    "arguments": "data: {init_args: [1]}",
    "trainer": "trainer: text",
    "size": "x: " + "y" * 2**19,
    "character": 'x: "\\UFFFFFFFF"',
    "NUL": "x: \0",
}


@pytest.mark.parametrize("file", ["hparams.yaml", "config.yaml"])
@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_odd_settings_end_no_comparison(file, content):
    (write("x/a", row(0.5)) / file).write_text(content)
    write("x/b", row(0.5))
    assert labels("x/a", "x/b") == ["a", "b"]


def test_settings_are_read_from_plain_files_only():
    folder = write("x/a", row(0.5))
    (folder / "hparams.yaml").unlink()
    os.mkfifo(folder / "hparams.yaml")
    (folder / "config.yaml").mkdir()
    assert labels("x/a") == ["a"]


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ("widths: [16, 32]", "widths=[16, 32]"),
        ("widths: {16: [], a: {b: 0.50}}", "widths={16: [], a: {b: 0.5}}"),
        ("day: 2024-01-02", "day=2024-01-02"),
        ("limit: .inf", "limit=.inf"),
        ('name: "\\ud800\\n"', r"name=\ud800\n"),
        ("me: &me [*me]", f"me={'[' * 100}"),
        ("me: &me {*me : 5}", f"me={'{' * 100}"),
        ("count: " + "9" * 5000, f"count={'9' * 994}..."),
    ],
)
def test_values_of_any_kind_have_a_text(content, label):
    write("x/a", row(0.5), **dict.fromkeys(("widths", "day", "limit", "name", "me", "count"), "other"))
    (write("x/b", row(0.5)) / "hparams.yaml").write_text(content)
    assert labels("x/a", "x/b")[1] == label


def test_a_text_without_end_is_cut():
    for value in "xy":
        (write(f"x/{value}", row(0.5)) / "hparams.yaml").write_text(NESTED.replace("x", value))
    assert max(map(len, labels("x/x", "x/y"))) == 1003
    assert compare_runs(["x/x", "x/y"])


# Finding and reading.


def test_the_newest_training_run_below_a_folder():
    for version in range(11):  # 10 is newer than 9, also within a second
        write(f"runs/version_{version}", row(0.5))
    write("runs/version_11", {"train/accuracy": 0.5})
    write("runs/version_12", test={"test/accuracy": 0.5})
    assert read_run(Path("runs")).folder == Path("runs/version_10")
    assert read_run(Path("runs/version_3")).folder == Path("runs/version_3")


@pytest.mark.parametrize("content", [b"\xff\xfe,\0", b"epoch,train/accuracy\n0,x\n,1\n5", b""])
def test_damaged_tables_are_refused_by_what_they_hold(content):
    (write("a", row(0.5)) / "losses.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"^a holds no run with val/accuracy; what it holds: "):
        compare_runs(["a"])


def test_what_is_no_number_is_skipped():
    folder = write("a", row(0.5), row("x"), row(""), row(0.75))
    assert read_run(folder).curve("val/accuracy") == {0: 0.5, 3: 0.75}


def test_more_curves_than_colors_are_a_table_without_a_picture():
    many = [write(f"many/{at}", row(0.5)) for at in range(len(STYLES) + 1)]
    said = compare_runs(many, "many.png")
    assert "no picture: 33 curves cannot be told apart, but 32 can" in said
    assert not Path("many.png").exists()


def test_invalid_runs_are_refused():
    Path("empty").mkdir()
    write("untested", {"train/accuracy": 0.5, "stage": TERNARY})
    write("tested/version_0", test={"test/accuracy": 0.5})
    write("a", row(0.5))
    Path("blank").mkdir()
    Path("blank/losses.csv").touch()
    Path("file").touch()
    for runs, message in (
        ([], "no runs"),
        (["missing"], "^missing: there is no such folder"),
        (["file"], "^file: there is no such folder"),
        (["a", "empty"], r"^empty holds no losses.csv, the table of a run \(loss_curves\)"),
        (["blank"], "^blank holds no run with val/accuracy; what it holds: nothing"),
        (["untested"], "^untested holds no run with val/accuracy; what it holds: train/accuracy"),
        (["tested"], "^tested holds no losses.csv"),
        (["a", "./a"], "a is named 2 times"),
    ):
        with pytest.raises(InputError, match=message):
            compare_runs(runs)
    with pytest.raises(InputError, match=r"^a holds no run with val/top5"):
        compare_runs(["a"], metric="top5")
    assert not Path("comparison.png").exists()


# The picture.


def test_the_picture_is_written_where_asked():
    compare_runs([write("a", *TWO_STAGES)], "new/folder/two.png")
    assert imread("new/folder/two.png").shape[1] == 960
    Path("taken.png").mkdir()
    for output in ("taken.png", "curves.txt", "a/hparams.yaml/x.png"):
        with pytest.raises(InputError, match=r"taken\.png|curves\.txt|hparams\.yaml"):
            compare_runs(["a"], output)


def test_a_picture_without_a_suffix_is_a_png():
    compare_runs([write("a", row(0.5))], "b/two")
    assert Path("b/two").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_written_whole_or_not_at_all(monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    write("a", row(0.5))
    Path("b").mkdir()
    Path("b/two.png").write_text("what was there before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"b/two\.png cannot be written \(No space left on device\)"):
        compare_runs(["a"], "b/two.png")
    assert [path.read_text() for path in Path("b").iterdir()] == ["what was there before"]


@pytest.mark.parametrize("name", ["_a", r"$\frac$", "a\nb"])
def test_folders_of_any_name_can_be_drawn(name):
    run = read_run(write(f"x/{name}", row(0.5)))
    assert len(cells(compare_runs([run.folder]))) == 1
    _, names = draw_groups(group_runs([run])).legends
    assert [text.get_text() for text in names.get_texts()] == [name.replace("\n", r"\n")]


def test_curves_are_what_was_logged():
    runs = [read_run(write("a", *TWO_STAGES)), read_run(write("b", row(0.5)))]
    accuracy, entropy = draw_groups(group_runs(runs)).axes
    assert (accuracy.get_ylabel(), entropy.get_ylabel()) == ("accuracy (%)", "cross-entropy (nats)")
    train, val, switch = (accuracy.lines[at] for at in (0, 1, -1))
    assert (train.get_linestyle(), val.get_linestyle(), switch.get_linestyle()) == ("-", "--", ":")
    assert list(val.get_xdata()) == [0, 1, 2, 3]
    assert list(val.get_ydata()) == [50, 75, 25, 62.5]
    assert list(switch.get_xdata()) == [1.5, 1.5]
    assert train.get_color() == val.get_color() == switch.get_color() == COLOURS[0]
    assert accuracy.lines[3].get_marker() == ".", "a single point can be seen"


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis():
    for name, last, scale in (("a", 0.5, "linear"), ("b", 0.01, "log")):
        run = read_run(write(name, row(0.5), {**row(0.5), "val/cross_entropy": last}))
        assert [axes.get_yscale() for axes in draw_groups(group_runs([run])).axes] == ["linear", scale]


def test_no_two_runs_look_alike():
    runs = [
        read_run(write(f"{name:02}", row(0.5, stage=TERNARY), row(0.5), name=name)) for name in range(len(COLOURS) + 2)
    ]
    figure = draw_groups(group_runs(runs))
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    assert len(set(looks)) == len(looks) == len(runs)
    assert len(figure.axes[0].lines) == 2 * len(runs) + 1, "one line where all change together"
    strokes, names = figure.legends
    assert [text.get_text() for text in strokes.get_texts()] == ["training", "validation", "ternary to binary"]
    assert [text.get_text() for text in names.get_texts()] == [f"name={name}" for name in range(len(runs))]


@pytest.mark.parametrize("amount", [1, 4, 12])
def test_nothing_overlaps(amount):
    runs = [read_run(write(f"{at:02}", *TWO_STAGES, at=at, name="long_" * 12 + str(at))) for at in range(amount)]
    figure = draw_groups(group_runs(runs))
    figure.draw_without_rendering()
    whole = figure.bbox
    boxes = [item.get_tightbbox() for item in (*figure.axes, *figure.legends)]
    for at, box in enumerate(boxes):
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
        assert not any(box.overlaps(other) for other in boxes[:at])
    assert figure.axes[0].get_window_extent().height > 250


# Real runs.


def test_a_real_run():
    logger = TensorBoardLogger(".", name="logs", default_hp_metric=False)
    model, data = tiny_pcnn(stage="ternary", projection_loss_weight=0.0), tiny_digits()
    callbacks = [StageSwitch(1), LossCurves()]
    trainer = fit(model, data, max_epochs=3, logger=logger, callbacks=callbacks, val_check_interval=0.5)
    trainer.test(model, datamodule=data)
    run = read_run(Path("logs"))
    assert run.folder == Path("logs/version_0")
    assert [row["stage"] for row in run.epochs] == ["ternary", "binary", "binary"]
    assert list(run.curve("val/accuracy")) == [0, 1, 2]
    assert list(run.curve("train/accuracy")) == [0, 1, 2]
    assert run.settings["projection_loss_weight"] == "0"
    assert run.result("accuracy", "binary")["test"] == pytest.approx(float(trainer.callback_metrics["test/accuracy"]))
    assert [row[0] for row in cells(compare_runs(["logs"]))] == ["logs/version_0", "binary"]


def test_reports_do_not_import_lightning():
    code = f"import sys, {pcnn_lightning.reports.__name__}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
