"""Comparison over seeds: sweeps, means and deviations, and published numbers."""

import csv
import random
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml
from compare_helpers import BINARY, TERNARY, cells, row, write
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from pcnn_lightning.cli import main
from pcnn_lightning.errors import InputError
from pcnn_lightning.reports.compare import compare as compare_runs
from pcnn_lightning.reports.compare.drawing import draw_groups
from pcnn_lightning.reports.compare.groups import Group, group_runs
from pcnn_lightning.reports.compare.runs import Run, read_run, read_runs
from pcnn_lightning.reports.compare.settings import plain_number, read_published
from pcnn_lightning.reports.compare.tables import ResultTable

PUBLISHED = Path(__file__).parents[2] / "configs/sweeps/published.yaml"
BESTS, TESTS = (0.5, 0.625, 0.875), (0.25, 0.375)


def name_of(method, seed):
    return f"method={method},seed_everything={seed}"


def write_sweep(folder, *values):
    """Write ``sweep.yaml``; the runs have not begun."""
    runs = {",".join(f"{name}={value}" for name, value in of_run.items()): of_run for of_run in values}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "sweep.yaml").write_text(yaml.safe_dump({"runs": runs}))


@pytest.fixture
def sweep():
    """Two methods: one with three seeds, of which two are tested; one with one seed of two."""
    values = [{"method": "bwn", "seed_everything": seed} for seed in range(3)]
    values += [{"method": "mcn", "seed_everything": seed} for seed in range(2)]
    write_sweep("sweep", *values)
    for seed, best in enumerate(BESTS):
        tested = {"stage": BINARY, "test/accuracy": TESTS[seed]} if seed < 2 else None
        folder = write(f"sweep/{name_of('bwn', seed)}/version_0", row(0.25), row(best), row(0.125), test=tested)
        (folder / "times.csv").write_text(f'epoch,seconds,device\n0,{60 * seed},"CPU, 1 thread"\n1,30,GPU {seed}\n')
        total = "total,1000000,500000,62500"
        (folder / "summary.csv").write_text(f"layer,parameters_1bit,parameters_2bit,parameters_32bit\n{total}\n")
    write(f"sweep/{name_of('mcn', 0)}/version_3", row(0.75, TERNARY), row(0.5))
    return "sweep"


def records(text):
    return list(csv.DictReader(text.splitlines()))


# The tables.


def test_a_sweep_is_averaged_over_seeds(sweep):
    assert compare_runs([sweep]).splitlines() == [
        "accuracy (%)",
        "",
        "                                       best",
        "run         n    stage  epochs          val            test  Mbit  minutes",
        "──────────────────────────────────────────────────────────────────────────",
        "method=bwn  3   binary       3  66.7 ± 19.1  31.2 ± 8.8 (2)  4.00      1.5",
        "method=mcn  1  ternary       1         75.0               -",
        "            1   binary       1         50.0               -     -        -",
        "",
        "mean ± sample standard deviation over seed_everything; (k) marks values of k",
        "runs, not n",
        "devices: CPU, 1 thread; GPU 0; GPU 1; GPU 2",
        "1 of 5 runs has not begun",
    ]


def test_csv_is_exact(sweep):
    found, ternary, binary = records(compare_runs([sweep], format="csv"))
    assert (found["run"], found["metric"], found["stage"], found["n"]) == ("method=bwn", "accuracy (%)", BINARY, "3")
    bests, tests = ([100 * value for value in values] for values in (BESTS, TESTS))
    for name, values in (
        ("best_val", bests),
        ("test", tests),
        ("last_val", [12.5] * 3),
        ("epochs", [3] * 3),
        ("at_epoch", [1] * 3),
        ("Mbit", [4.0] * 3),
        ("minutes", [0.5, 1.5, 2.5]),
    ):
        assert float(found[f"{name}_mean"]) == pytest.approx(mean(values), rel=1e-14)
        assert float(found[f"{name}_std"]) == pytest.approx(stdev(values), rel=1e-14)
        assert found[f"{name}_n"] == str(len(values))
    assert found["devices"] == "CPU, 1 thread; GPU 0; GPU 1; GPU 2"
    assert [line["best_val_mean"] for line in (ternary, binary)] == ["75.0", "50.0"]
    assert [line["best_val_std"] for line in (ternary, binary)] == ["", ""]
    assert {
        line[f"{name}_{of}"] for line in (ternary, binary) for name in ("test", "Mbit") for of in ("mean", "n")
    } == {""}


def test_markdown(sweep):
    assert compare_runs([sweep], format="markdown", published=PUBLISHED).splitlines() == [
        "accuracy (%)",
        "",
        "| run | n | stage | epochs | best val | test | Mbit | minutes | published |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| method=bwn | 3 | binary | 3 | 66.7 ± 19.1 | 31.2 ± 8.8 (2) | 4.00 | 1.5 | - |",
        "| method=mcn | 1 | ternary | 1 | 75.0 | - |  |  |  |",
        "|  | 1 | binary | 1 | 50.0 | - | - | - | 92.08 |",
        "",
        "mean ± sample standard deviation over seed_everything; (k) marks values of k runs, not n",
        "",
        "devices: CPU, 1 thread; GPU 0; GPU 1; GPU 2",
        "",
        "1 of 5 runs has not begun",
        "",
        f"published: of the networks and lengths in {PUBLISHED}, not of these runs",
    ]


def test_names_cannot_become_markup():
    groups = [Group([Run(Path("a"), [{"epoch": 0, "stage": BINARY, "val/x|y": 1.0}], {})], "<b>|*`[a]")]
    title, _, _, _, line = ResultTable(groups, "x|y").to_markdown().splitlines()
    assert title == r"x\|y"
    assert line.startswith(r"| \<b>\|\*\`\[a] | binary | 1 | 1.0000 |")


def test_a_loss_has_three_decimals_and_no_published_numbers(sweep):
    assert cells(compare_runs([sweep], metric="cross_entropy"))[0][4] == "1.500 ± 0.000"
    with pytest.raises(InputError, match="published numbers are of the metric accuracy, but got cross_entropy"):
        compare_runs([sweep], metric="cross_entropy", published=PUBLISHED)


@given(
    columns=st.integers(80, 120),
    labels=st.lists(st.text("xqz= ", min_size=1, max_size=60), min_size=1, max_size=3),
    stage=st.sampled_from([BINARY, "full_precision"]),
    values=st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_no_name_or_number_is_cut_to_fit(columns, labels, stage, values):
    def run(at):
        tests = [{"stage": stage, "test/accuracy": values[at]}] if at < 2 else []
        epochs = [{"epoch": epoch, "stage": stage, "val/accuracy": values[at]} for epoch in range(98 + at)]
        return Run(Path(str(at)), epochs, {}, tests, megabits=10.99, minutes=100.0)

    groups = [Group([run(at) for at in range(3)], label) for label in labels]
    published = read_published(PUBLISHED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        shown = ResultTable(groups, averaged=True, published={labels[0]: published["method=mcn"]}).to_text()
    assert max(map(cell_len, shown.splitlines())) <= columns
    _, body = re.split(r"─+\n", shown)
    assert [char for char in body if char in "xqz="] == [char for char in "".join(labels) if char != " "]
    percents = [100 * value for value in values]
    for text in (f"{mean(percents):.1f}", f"± {stdev(percents):.1f}", f"± {stdev(percents[:2]):.1f} (2)"):
        assert body.count(text) >= len(labels)
    assert "92.08" in body
    assert body.count("98–100") == body.count("10.99") == len(labels)


# Which runs are averaged.


def write_run(name, seed=None, **settings):
    folder = write(name, row(0.5), **settings)
    if seed is not None:
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")
    return folder


def groups(*folders, over="seed_everything"):
    found = group_runs([read_run(Path(folder)) for folder in folders], over)
    return {group.label: [run.folder.name for run in group.runs] for group in found}


def test_runs_named_one_by_one_are_averaged_over_seeds():
    for at, (weight, seed) in enumerate([(0.0, 0), (1e-4, 0), (0.0, 1), (1e-4, 1), (0.5, 0)]):
        write_run(str(at), seed, weight=weight)
    names = [str(at) for at in range(5)]
    assert groups(*names) == {"weight=0": ["0", "2"], "weight=0.0001": ["1", "3"], "weight=0.5": ["4"]}
    assert [len(line) for line in cells(compare_runs(names))[:1]] == [5], "run, n, stage, epochs and best"
    apart = groups(*names, over=None)
    assert apart["weight=0.0001, seed_everything=1"] == ["3"]
    assert groups(*names[:2], over="weight") == {str(Path.cwd().name): ["0", "1"]}
    with pytest.raises(
        InputError, match="no run has the setting sede to average over: seed_everything, weight or null"
    ):
        groups(*names, over="sede")


def test_runs_that_may_be_equal_are_not_averaged():
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", None), ("e", None)):
        write_run(name, seed, weight=0.5)
    assert [*groups("a", "b", "c").values()] == [["a"], ["b"], ["c"]], "a and b may be one run"
    assert [*groups("d", "e").values()] == [["d"], ["e"]], "no seed is recorded"
    assert groups("a", "c") == {Path.cwd().name: ["a", "c"]}


def test_a_different_trainer_or_stage_switch_keeps_runs_apart():
    for key, one, two in (
        ("trainer", {"max_epochs": 2}, {"max_epochs": 3}),
        ("trainer", {"limit_train_batches": None}, {"limit_train_batches": 0.5}),
        ("trainer", {"devices": 1}, {"devices": 2}),
        ("trainer", {"precision": "bf16-mixed"}, {"precision": 32}),
        ("stage_switch", {"init_args": {"epoch": 0.5}}, {"init_args": {"epoch": 0.6}}),
    ):
        for name, seed, value in (("a", 0, one), ("b", 1, two)):
            (write(name, row(0.5)) / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, key: value}))
        assert len(groups("a", "b")) == 2


def test_runs_of_two_sweeps_are_kept_apart():
    for folder, seed in (("x/one", 0), ("x/two", 1)):
        write_sweep(folder, {"method": "mcn", "seed_everything": seed})
        write(f"{folder}/{name_of('mcn', seed)}/version_0", row(0.5))
    runs = [run for folder in ("x/one", "x/two") for run in read_runs(Path(folder))[0]]
    assert [len(group.runs) for group in group_runs(runs)] == [1, 1]


@given(
    runs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_the_order_of_runs_does_not_matter(runs, seed):
    found = [
        Run(
            Path(f"{at}"),
            [{"epoch": 0, "stage": BINARY, "val/accuracy": value}],
            {"method": method, "seed_everything": str(number)},
            sweep=Path("s"),
        )
        for at, (method, number, value) in enumerate(runs)
    ]
    lines = []
    for _ in range(2):
        made = group_runs(found)
        assert sum(len(group.runs) for group in made) == len(found)
        lines.append(sorted(ResultTable(made, averaged=True).to_csv().splitlines()))
        random.Random(seed).shuffle(found)
    assert lines[0] == lines[1]
    for group in made:
        values = [run.epochs[0]["val/accuracy"] for run in group.runs]
        best = group.curve("val/accuracy")[0]
        assert best.mean == pytest.approx(mean(values), abs=1e-15)
        assert len(values) < 2 or best.std == pytest.approx(stdev(values), abs=1e-15)


# Reading.


def test_what_is_damaged_in_the_tables_of_a_run_is_missing():
    folder = write("a", row(0.5))
    for content in ("", "layer\ntotal\n", "seconds,parameters_1bit\nx,y\n", "epoch,seconds,device\n0,inf,CPU\n"):
        for name in ("times.csv", "summary.csv"):
            (folder / name).write_text(content)
        run = read_run(folder)
        assert (run.megabits, run.minutes, list(run.devices)) == (None, None, [])
    (folder / "losses.csv").write_text("epoch,stage\n0," + "x" * 200_000)
    with pytest.raises(InputError, match=r"^a/losses.csv is not a table: field larger"):
        read_run(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"must hold a mapping, but got nothing"),
        ("runs: {", r"is not YAML: line 1: expected"),
        ("runs: 5", r"runs must be a mapping from folders to values, but got 5"),
        ("runs: {}", r"runs must be a mapping from folders to values, but got {}"),
        ("runs: {../x: {a: 1}}", r"a run must be named as its folder beside this file, but got \.\./x"),
        ("runs: {..: {a: 1}}", r"a run must be named as its folder"),
        ('runs: {"x\\0": {a: 1}}', r"a run must be named as its folder .* got x\\x00"),
        ("runs: {? [x] : {a: 1}}", r"a run must be named as its folder .* got \[x\]"),
        ("runs: {x: 5}", r"x must be a mapping from settings to values, but got 5"),
        ("runs: &a {x: *a}", r"none of its 1 runs has begun"),
        ("runs: &a {x: [*a]}", r"x must be a mapping from settings to values, but got \[{x: \[{x: "),
        ("runs: {" + "x" * 300 + ": {a: 1}}", r"a run must be named as its folder"),
        ("x: " + "[" * 5000, r"is not YAML: RecursionError"),
        ("x: " + "y" * 2**19, r"has 524291 bytes: at most 262144 are read"),
        ("\0", r"is not YAML: "),
    ],
)
def test_a_damaged_sweep_is_refused(content, message):
    Path("s").mkdir()
    Path("s/sweep.yaml").write_text(content)
    with pytest.raises(InputError, match=rf"^s/sweep.yaml:? {message}") as refused:
        compare_runs(["s"])
    assert "\n" not in str(refused.value)


def test_endless_values_have_a_label():
    Path("s").mkdir()
    Path("s/sweep.yaml").write_text("runs: {x: &a {m: [*a], n: 1}}")
    write("s/x/version_0", row(0.5))
    assert cells(compare_runs(["s"]))[0][0].startswith("m=[{m: [{m:")


def test_a_run_that_has_not_been_validated_yet_has_not_begun(sweep):
    write(f"sweep/{name_of('mcn', 1)}/version_0", {"train/accuracy": 0.5, "stage": BINARY})
    assert "1 of 5 runs has not begun" in compare_runs([sweep])


def test_what_a_sweep_averages_over_may_be_named_in_full():
    for seed in (0, 1):
        write(f"sweep/seed={seed}/version_0", row(0.5))
    write_sweep("sweep", {"seed": 0}, {"seed": 1})
    assert "over data.seed" in (said := compare_runs(["sweep"], over="data.seed"))
    assert "50.0 ± 0.0" in said


def test_a_sweep_needs_the_metric(sweep):
    with pytest.raises(InputError, match="holds no run with val/top5; what it holds: train/accuracy, "):
        compare_runs([sweep], metric="top5")
    with pytest.raises(InputError, match="is named 2 times"):
        compare_runs([sweep, f"sweep/{name_of('mcn', 0)}"])
    with pytest.raises(InputError, match="format must be one of table, csv, markdown, but got html"):
        compare_runs([sweep], format="html")


# Published numbers.


def test_published_numbers_are_those_that_were_published():
    stated = {"92.79", "91.92", "92.24", "91.52", "92.08", "92.10", "93.69"}  # PCNN-22 by λ; MCN, MCN-1 and U-MCN
    found = read_published(PUBLISHED)
    assert {number.accuracy for number in found.values()} == stated
    by_weight = [found[f"projection_loss_weight={weight}"].accuracy for weight in ("0.001", "0.0001", "1e-05", "0")]
    assert by_weight == ["91.92", "92.79", "92.24", "91.52"]
    methods = [found[f"method={name}"].accuracy for name in ("pcnn_binary", "mcn", "mcn_1", "u_mcn")]
    assert methods == ["92.79", "92.08", "92.10", "93.69"]


def test_numbers_are_matched_however_they_are_written():
    values = [{"weight": weight} for weight in ("1e-4", 0.0, 1, 0.5)]
    write_sweep("s", *values)
    for value in values:
        write(f"s/weight={value['weight']}/version_0", row(0.5))
    numbers = {"weight=0.00010": 1.5, "weight=0": 2.5, "weight=1.0": 3.5}
    Path("p.yaml").write_text(yaml.safe_dump({name: {"accuracy": of, "source": "x"} for name, of in numbers.items()}))
    lines = cells(compare_runs(["s"], published="p.yaml"))
    assert {line[0]: line[-1] for line in lines[:4]} == {
        "weight=0.0001": "1.5",
        "weight=0": "2.5",
        "weight=1": "3.5",
        "weight=0.5": "-",
    }
    assert [plain_number(text) for text in ("1e-4", "1.", "1e5", "16777217.0", "12", "1e", "x1.0", "-.5")] == [
        *("0.0001", "1", "100000", "16777217", "12", "1e", "x1.0", "-0.5")
    ]


def test_published_numbers_of_other_runs_are_named():
    write("a", row(0.5))
    Path("p.yaml").write_text("method=x: {accuracy: 5, source: y}")
    shown = compare_runs(["a"], published="p.yaml")
    assert shown.endswith("\n\nno run is labeled as one of p.yaml: method=x")
    assert "published" not in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", r"must hold a mapping, but got \[1\]"),
        ("m=x: 92", r"m=x must be {accuracy: \.\.\., source: \.\.\.}, but got 92"),
        ("m=x: {accuracy: 92}", r"m=x must be {accuracy: \.\.\., source: \.\.\.}, but got {accuracy: 92}"),
        ("m=x: &a {accuracy: *a, source: y}", r"accuracy of m=x must be a number from 0 to 100, but got {accuracy: {"),
        ("m=x: {accuracy: true, source: y}", r"accuracy of m=x must be a number from 0 to 100, but got true"),
        ("m=x: {accuracy: .inf, source: y}", r"accuracy of m=x must be a number from 0 to 100, but got \.inf"),
        ("m=x: {accuracy: 100.5, source: y}", r"accuracy of m=x must be a number from 0 to 100, but got 100\.5"),
        ("m=x: {accuracy: -1, source: y}", r"accuracy of m=x must be a number from 0 to 100, but got -1"),
        ("m=x: {accuracy: 92, source: 5}", r"source of m=x must be text, but got 5"),
        ("m=x: {accuracy: 92, source: [y]}", r"source of m=x must be text, but got \[y\]"),
    ],
)
def test_a_damaged_file_of_published_numbers_is_refused(content, message):
    write("a", row(0.5))
    Path("p.yaml").write_text(content)
    with pytest.raises(InputError, match=rf"^p.yaml:? {message}"):
        compare_runs(["a"], published="p.yaml")
    with pytest.raises(InputError, match=r"^no.yaml: there is no such file"):
        compare_runs(["a"], published="no.yaml")


# The picture.


def test_the_picture_has_means_and_bands():
    curves = [(0.25, 0.5, 0.75), (0.5, 0.625), (0.0, 0.125, 0.5, 0.25)]
    for seed, curve in enumerate(curves):
        (write(f"{seed}", *map(row, curve)) / "config.yaml").write_text(f"seed_everything: {seed}")
    figure = draw_groups(group_runs([read_run(Path(f"{seed}")) for seed in range(3)]))
    accuracy, entropy = figure.axes
    _, val = accuracy.lines
    shared = [[100 * curve[epoch] for curve in curves] for epoch in range(2)]
    assert list(val.get_xdata()) == [0, 1]
    assert list(val.get_ydata()) == pytest.approx([mean(values) for values in shared])
    band = accuracy.collections[1].get_paths()[0].vertices
    for epoch, values in enumerate(shared):
        edges = [y for x, y in band if x == epoch]
        assert (min(edges), max(edges)) == pytest.approx((mean(values) - stdev(values), mean(values) + stdev(values)))
    assert accuracy.collections[1].get_facecolor()[0][:3] == pytest.approx(
        accuracy.collections[0].get_facecolor()[0][:3]
    )
    assert len(entropy.collections) == 2
    assert "± 1 standard deviation" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_band_that_reaches_zero_leaves_a_logarithmic_axis_as_it_is():
    for seed, last in enumerate((0.001, 0.1)):
        folder = write(f"{seed}", row(0.5), {**row(0.5), "val/cross_entropy": last})
        (folder / "config.yaml").write_text(f"seed_everything: {seed}")
    _, entropy = draw_groups(group_runs([read_run(Path(f"{seed}")) for seed in range(2)])).axes
    assert entropy.get_yscale() == "log"
    assert entropy.get_ylim()[0] > 0.01


# The command line.


def test_the_command_line(sweep, capsys):
    main(["compare", sweep, "--format=csv", f"--published={PUBLISHED}"])
    lines = records(capsys.readouterr().out)
    assert [(line["run"], line["published"]) for line in lines] == [
        ("method=bwn", ""),
        ("method=mcn", ""),
        ("method=mcn", "92.08"),
    ]
    main(["compare", sweep, "--over", "null"])
    assert capsys.readouterr().out.count("seed_everything=") == 4, "runs by themselves"
    with pytest.raises(SystemExit):
        main(["compare", sweep, "--format=html"])
