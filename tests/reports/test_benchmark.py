"""What benchmarks measure and print; the measured times themselves are not tested."""

import sys
import time
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import fit, tiny_digits, tiny_mcn, tiny_pcnn
from torch import nn

from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import QuantizedConv2d
from pcnn_lightning.reports.benchmark import Report, Setting, benchmark_inference, benchmark_layer, benchmark_training
from pcnn_lightning.reports.benchmark.measure import Stopwatch, compare_rounds, peak_megabytes
from pcnn_lightning.reports.benchmark.training import Training, loader_rate

CPU = torch.device("cpu")
ONCE = Setting(CPU, rounds=1, warmup=0)


@pytest.fixture
def clock(monkeypatch):
    """A fake clock that advances by ``time.sleep``."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


def test_a_stopwatch_tells_phases_apart(clock):
    watch = Stopwatch(CPU)
    for short, long in ((0.25, 1), (0.5, 2)):
        time.sleep(4)  # between rounds, not part of a phase
        watch.start()
        time.sleep(short)
        watch.mark("short")
        time.sleep(long)
        watch.mark("long")
    assert watch.read() == {"short": [250, 500], "long": [1000, 2000]}


def test_contenders_take_turns_after_warm_up(clock):
    turns = []

    def contender(name, *seconds):
        times = iter(seconds)

        def turn(watch):
            turns.append(name)
            watch.start()
            time.sleep(next(times))
            watch.mark("work")

        return turn

    slow, fast = contender("slow", 99, 99, 99, 4, 8, 4), contender("fast", 99, 99, 99, 1, 4, 4)
    report = compare_rounds("sleep", 10, {"slow": slow, "fast": fast}, Setting(CPU, rounds=3, warmup=2))
    assert turns == ["slow", "fast"] * 2 + ["slow", "fast"] + ["slow", "fast"] * 3  # one each for the memory
    assert report.milliseconds == {"slow": {"work": 4000}, "fast": {"work": 4000}}
    assert report.speed_ups == {"slow": 1, "fast": 2}  # the median of 4, 2 and 1


@given(megabytes=st.integers(1, 40))
def test_peak_memory_counts_live_tensors(megabytes):
    def turn(watch):
        for _ in range(3):  # one after the other
            torch.empty(megabytes, 1000, 1000, dtype=torch.uint8)
        kept = torch.empty(megabytes, 1000, 1000, dtype=torch.uint8)
        both = torch.empty(1, 1000, 1000, dtype=torch.uint8)
        del kept, both

    assert peak_megabytes(turn, CPU) == pytest.approx(megabytes + 1, abs=0.01)


def test_the_table():
    times = {"twin": {"forward": 1.0, "step": 1.6}, "PCNN": {"forward": 1.5, "step": 2.0}}
    report = Report("a title", 8, times, {"twin": 2.5, "PCNN": 3.0}, {"twin": 1.0, "PCNN": 0.8})
    assert report.table().splitlines() == [
        "a title",
        "",
        "                  twin   PCNN",
        "─────────────────────────────",
        "forward, ms       1.00   1.50",
        "step, ms          1.60   2.00",
        "images/s         5,000  4,000",
        "peak memory, MB    2.5    3.0",
        "speed-up          1.00   0.80",
        "",
        "speed-up over twin: above 1 is faster",
    ]
    for found in times.values():
        found |= {"data": 0.05, "step": found.pop("step")}  # the whole comes last
    words = replace(report, loader=1234.4).table().splitlines()[-2:]
    assert words == ["waiting for data: 2.5% of the step of PCNN", "data alone: 1,234 images/s"]


def test_a_single_phase_has_a_row_per_contender():
    times = {"full precision, torch": {"labels": 0.5}, "frozen, C": {"labels": 0.25}}
    report = Report("a title", 1, times, {}, {"full precision, torch": 1.0, "frozen, C": 2.0})
    assert report.table().splitlines()[2:6] == [
        "                       labels, ms  images/s  speed-up",
        "─────────────────────────────────────────────────────",
        "full precision, torch        0.50     2,000      1.00",
        "frozen, C                    0.25     4,000      2.00",
    ]


@given(
    names=st.lists(st.text("xyz, ", min_size=1, max_size=20), min_size=2, max_size=4, unique=True),
    phases=st.lists(st.sampled_from(["data", "augment", "forward", "backward", "optimizer"]), max_size=5, unique=True),
    milliseconds=st.floats(0.01, 99_999),
)
def test_no_name_or_number_is_cut_to_fit(names, phases, milliseconds):
    """Four contenders have all their phases in 80 columns."""
    times = {name: dict.fromkeys((*phases, "step"), milliseconds) for name in names}
    report = Report("title " * 40, 128, times, dict.fromkeys(names, 99_999.9), dict.fromkeys(names, 1.0))
    shown = report.table()
    assert max(map(len, shown.splitlines())) <= max(80, 15 + sum(2 + max(len(name), 8) for name in names))
    assert shown.count(f"{milliseconds:.2f}") >= len(names) * (len(phases) + 1)
    assert shown.count("99,999.9") == len(names)
    assert all(name.strip() in shown for name in names)


@pytest.mark.parametrize(
    "model",
    [
        tiny_pcnn(projections=3, optimizer="adam", stage="ternary", sigma=0.5, center_loss_weight=0.1),
        tiny_mcn(planes=3, label_smoothing=0.1, levels=3),
        tiny_mcn(backbone="mcn20", average=True),
    ],
    ids=["PCNN", "MCN", "MCN-1"],
)
def test_twin_has_the_same_shapes_in_full_precision(model):
    twin = model.twin()
    assert twin.stage == "full_precision"
    ours = [part for part in model.net.modules() if isinstance(part, (QuantizedConv2d, nn.Conv2d))]
    theirs = [part for part in twin.net.modules() if isinstance(part, (QuantizedConv2d, nn.Conv2d))]
    shape = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    assert [[getattr(part, name) for name in shape] for part in ours] == [
        [getattr(part, name) for name in shape] for part in theirs
    ]
    assert all(type(part) is nn.Conv2d for part in theirs)
    for name in ("optimizer", "label_smoothing", "center_loss_weight", "weight_decay", "eta1"):
        assert twin.hparams[name] == model.hparams[name], name


@pytest.mark.parametrize("tiny", [tiny_pcnn, tiny_mcn])
def test_the_steps_that_are_timed_are_those_of_the_loop(tiny):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tiny(center_loss_weight=0.1, gradient_clip=0.5, warmup_epochs=0.0))
    data = tiny_digits(train_size=48)
    fit(models[0], data, limit_val_batches=0)
    training = Training(models[1], data, ONCE)
    for _ in range(3):
        training.step(Stopwatch(CPU))
    assert models[0].terms["center_loss"].centers.abs().sum() > 0
    for name, value in models[0].state_dict().items():
        if name.startswith(("net.", "_terms.")):
            torch.testing.assert_close(models[1].state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_images_are_counted_where_there_are_fewer_than_a_batch():
    assert benchmark_training(tiny_pcnn(), tiny_digits(train_size=10, batch_size=64), ONCE).images == 10


@pytest.mark.parametrize("setting", [ONCE, Setting(CPU, "bf16-mixed", channels_last=True, rounds=2, warmup=1)], ids=str)
def test_training(setting):
    report = benchmark_training(tiny_pcnn(), tiny_digits(), setting)
    assert list(report.milliseconds) == list(report.megabytes) == list(report.speed_ups) == ["full precision", "PCNN"]
    for times in report.milliseconds.values():
        assert list(times) == ["data", "augment", "forward", "backward", "optimizer", "step"]
        assert 0 < times["forward"] < times["step"]
    assert min(report.megabytes.values()) > 0
    assert report.images == 16
    assert report.loader is not None
    assert report.title.startswith(f"training step, wrn7 2-2-2-2, batch 16, {setting.precision}")


def test_the_rate_of_a_loader_is_that_of_its_batches(clock):
    data = tiny_digits(batch_size=8)
    data.setup("fit")
    loaded = data.on_after_batch_transfer

    def slowly(batch, index):
        time.sleep(0.25)
        return loaded(batch, index)

    data.on_after_batch_transfer = slowly
    assert loader_rate(data, CPU, seconds=3) == 8 / 0.25


RUNTIMES = [
    *("full precision, torch", "full precision, OpenVINO"),
    *("frozen, torch", "frozen, ONNX Runtime", "frozen, OpenVINO", "frozen, C"),
]


@pytest.mark.parametrize(
    "model",
    [
        tiny_pcnn(),
        tiny_pcnn(stage="ternary"),
        tiny_pcnn(full_precision=True),
        tiny_mcn(),
        tiny_mcn(average=True, levels=3),
        tiny_pcnn(
            backbone="torchvision/resnet18",
            widths=None,
            small_images=True,
            projections=1,
            convert={"activations": "sign"},
        ),
    ],
    ids=["PCNN", "ternary", "full precision", "MCN", "MCN-1", "converted"],
)
def test_inference(model):
    report = benchmark_inference(model, tiny_digits(), 3, ONCE)
    assert list(report.milliseconds) == RUNTIMES
    assert all(list(times) == ["labels"] for times in report.milliseconds.values())
    assert next(iter(report.speed_ups.values())) == 1
    assert report.table().endswith("speed-up over full precision, torch: above 1 is faster")


@pytest.mark.parametrize(
    ("missing", "without", "message"),
    [
        ("onnxruntime", "ONNX Runtime", "onnxruntime is not installed"),
        ("openvino", "OpenVINO", "OpenVINO is not installed"),
        ("cc", "C", "there is no C compiler 'no-cc'"),
    ],
)
def test_a_runtime_that_is_not_installed_takes_no_part(missing, without, message, monkeypatch):
    if missing == "cc":
        monkeypatch.setenv("CC", "no-cc")
    elif missing == "openvino":
        monkeypatch.setitem(sys.modules, "openvino", None)
    else:
        monkeypatch.setattr("pcnn_lightning.reports.benchmark.inference.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=f"{without} takes no part: {message}"):
        report = benchmark_inference(tiny_pcnn(), tiny_digits(), 3, ONCE)
    assert list(report.speed_ups) == [name for name in RUNTIMES if not name.endswith(f", {without}")]


def test_a_layer_is_timed_at_the_size_it_has_in_the_network():
    model = tiny_pcnn(widths=[2, 2, 3, 2], projections=2)
    name = "features.stage3.0.conv"
    report = benchmark_layer(model, name, (1, 8, 8), 5, ONCE)
    assert report.title.startswith(f"{name}, 6→4, 3×3 on 5×6×4×4, 32-true")
    assert list(report.milliseconds)[:2] == ["nn.Conv2d", "ProjectionConv2d"]
    assert "ModulatedConv2d" in benchmark_layer(tiny_mcn(), "features.stem", (1, 8, 8), 5, ONCE).speed_ups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_may_be_of_another_dtype_than_the_default(dtype):
    model = tiny_pcnn().to(dtype)
    torch.set_default_dtype(torch.float32 if dtype == torch.float64 else torch.float64)
    try:
        assert benchmark_layer(model, "features.stage1.0.conv", (1, 8, 8), 2, ONCE)
    finally:
        torch.set_default_dtype(torch.float32)


def test_unknown_layer_is_refused():
    with pytest.raises(InputError, match=r"layer must be one of features.stage1.0.conv, .*, but got 'stem'"):
        benchmark_layer(tiny_pcnn(), "stem", (1, 8, 8), 5, ONCE)
    with pytest.raises(InputError, match="layer must be left out: this network has no 1-bit layers, but got 'stem'"):
        benchmark_layer(tiny_pcnn(full_precision=True), "stem", (1, 8, 8), 5, ONCE)


def test_other_libraries_take_part_where_they_are_installed(monkeypatch):
    """The peers are not dependencies, so a stand-in checks that they are called with the shape of the layer."""
    made = []

    class QConv2d(nn.Conv2d):
        def __init__(self, *shape, input_quantization, weight_quantization, **options):
            made.append((shape, input_quantization, weight_quantization))
            super().__init__(*shape, **options)

    bitorch, layers = ModuleType("bitorch"), ModuleType("bitorch.layers")
    layers.QConv2d = QConv2d
    monkeypatch.setitem(sys.modules, "bitorch", bitorch)
    monkeypatch.setitem(sys.modules, "bitorch.layers", layers)
    monkeypatch.setattr("pcnn_lightning.reports.benchmark.layer.find_spec", lambda name: name == "bitorch" or None)
    report = benchmark_layer(tiny_pcnn(), "features.stage2.0.conv", (1, 8, 8), 2, ONCE)
    assert list(report.milliseconds) == ["nn.Conv2d", "ProjectionConv2d", "bitorch"]
    assert made == [((4, 4, (3, 3), (2, 2), (1, 1), (1, 1)), "sign", "sign")]
