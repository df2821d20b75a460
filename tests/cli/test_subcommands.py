"""``summary``, ``export``, ``compare`` and ``benchmark``."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from cli_helpers import DIGITS, FIT, KEEP, NETWORK, QUIET, TRAINING, in_folder
from PIL import Image

from pcnn_lightning import PCNN
from pcnn_lightning.cli import main
from pcnn_lightning.deploy import compile_openvino, freeze, load_packed
from pcnn_lightning.reports.benchmark import Report

# --- summary --------------------------------------------------------------------------------------------------------


def test_summary_in_three_formats(command):
    table, csv_text, json_text = (
        command("summary", *DIGITS, *NETWORK, *QUIET, f"--format={form}").out for form in ("table", "csv", "json")
    )
    assert "full-precision twin" in table
    total = json.loads(json_text)["total"]
    assert json.loads(json_text)["image_shape"] == [1, 8, 8]
    *_, last = csv.DictReader(csv_text.splitlines())
    assert {name: str(value) for name, value in total.items() if isinstance(value, int)}.items() <= last.items()
    # Stage 1 to 3 of 4 channels: three 3×3 convolutions of 4×4 kernels each.
    assert total["parameters_1bit"] == 3 * 4 * 4 * 9
    assert f"{total['parameters_1bit']:,}" in table


def test_summary_of_data_without_image_shape(command):
    run = command("summary", "--data=cli_helpers.WrongLabels", "--data.label=0", *NETWORK, *QUIET)
    run.is_refused("WrongLabels has no image_shape")


def test_an_unknown_summary_format(command):
    command("summary", *DIGITS, *NETWORK, *QUIET, "--format=html").is_usage_error("format", "html")


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_of_each_stage(command, trained):
    for stage in ("ternary", "binary"):
        (path,) = trained.glob(f"{stage}*.ckpt")
        run = command("export", *DIGITS, *QUIET, f"--ckpt_path={path}")
        network = load_packed("network.safetensors")
        assert run.out.strip() == f"network.safetensors: {Path('network.safetensors').stat().st_size:,} bytes"
        assert network.description.stage == stage
        assert network.description.class_names == tuple("0123456789")
        assert all(
            torch.equal(network.state_dict()[name], value)
            for name, value in freeze(PCNN.load_from_checkpoint(path).net).state_dict().items()
        )


def test_export_by_name_and_from_a_packed_file(command, trained, packed):
    run = command("export", *DIGITS, *TRAINING, *in_folder(trained), "--ckpt_path=last", "--output=a/b.safetensors")
    assert run.code == 0, run.err
    assert Path("a/b.safetensors").read_bytes() == packed.read_bytes()
    run = command("export", *DIGITS, *QUIET, f"--ckpt_path={packed}", "--format=torch")
    assert run.code == 0, run.err
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    logits = torch.export.load("network.pt2").module()(images)
    assert torch.equal(logits.argmax(1), load_packed(packed).classify(images))


@pytest.mark.parametrize(("format", "suffixes"), [("openvino", [".xml", ".bin"]), ("c", [".c", ".h"])])
@pytest.mark.parametrize("source", ["last.ckpt", "digits.safetensors"])
def test_export_of_two_files(command, trained, packed, source, format, suffixes):
    run = command("export", *DIGITS, *QUIET, f"--ckpt_path={trained / source}", f"--format={format}")
    assert run.code == 0, run.err
    files = [Path(f"network{suffix}") for suffix in suffixes]
    assert run.out.splitlines() == [f"{file}: {file.stat().st_size:,} bytes" for file in files]
    run = command("export", *DIGITS, *QUIET, f"--ckpt_path={packed}", f"--format={format}", "--output=b.txt")
    run.is_refused(f"NAME{suffixes[0]}", "b.txt")
    if format == "openvino":
        images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
        assert torch.equal(compile_openvino(files[0]).classify(images), load_packed(packed).classify(images))
    elif shutil.which("cc") is not None:
        test = "cc -std=c99 -O2 -DPCNN_SELF_TEST network.c -o self_test && ./self_test"
        assert subprocess.run(test, shell=True, check=False).returncode == 0


def test_export_errors(command, trained, monkeypatch):
    export = ["export", *DIGITS, *QUIET, f"--ckpt_path={trained}/last.ckpt"]
    command("export", *DIGITS, *TRAINING).is_refused("export needs trained weights", "--ckpt_path")
    command(*export, "--format=tflite").is_usage_error("format", "packed", "openvino", "onnx", "torch", "tflite")
    Path("folder").mkdir()
    command(*export, "--output=folder").is_refused("folder cannot be written", "Is a directory")
    command(*export, "--data=cli_helpers.WrongLabels", "--data.label=0").is_refused("classifier", "(10,)", "(3,)")
    three = ["--data=cli_helpers.WrongLabels", "--data.label=0", *TRAINING]
    assert command("fit", *three, *KEEP).code == 0
    command("export", *three, "--ckpt_path=kept/last.ckpt").is_refused("WrongLabels has no image_shape")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    command(*export, "--format=onnx").is_refused("onnxscript", ".[onnx]")
    monkeypatch.setitem(sys.modules, "openvino", None)
    command(*export, "--format=openvino").is_refused("OpenVINO is not installed", ".[openvino]")
    command(*export, "--format=c", "--output=1.c").is_refused("names in C cannot begin with '1'")
    assert [path.name for path in Path().iterdir() if path.suffix in (".safetensors", ".onnx", ".xml", ".c")] == []


# --- compare --------------------------------------------------------------------------------------------------------


def test_compare_prints_a_table_and_draws(command):
    flags = [flag for flag in FIT if flag != "--trainer.logger=false"]
    for weight in (0, 0.001):
        command(
            *flags,
            "--trainer.logger=CSVLogger",
            "--trainer.logger.save_dir=logs",
            f"--run_dir=runs/{weight}",
            f"--model.projection_loss_weight={weight}",
        )
    run = command("compare", "runs/0", "runs/0.001", "--output=both.png")
    assert run.code == 0
    assert "projection_loss_weight=0\nruns/0" in re.sub(r"  .*", "", run.out)
    assert Image.open("both.png").size[0] > 300
    command("compare", "runs/0", "runs/elsewhere").is_refused("runs/elsewhere: there is no such folder")
    command("compare").is_usage_error("runs")


# --- benchmark ------------------------------------------------------------------------------------------------------


CONFIG = Path(__file__).parents[2] / "configs/digits.yaml"
BENCHMARK = ["benchmark", "--config", str(CONFIG), "--data.init_args.train_size", "128", "--rounds", "1"]


def test_benchmark_output(capsys):
    main([*BENCHMARK, "--warmup", "0", "--channels_last", "true"])
    shown = capsys.readouterr().out
    assert "training step, wrn7" in shown
    assert "channels last" in shown
    assert "speed-up over full precision: above 1 is faster" in shown
    main([*BENCHMARK, "--warmup", "0", "--format", "json", "--layer", "features.stage1.0.conv"])
    shown = capsys.readouterr().out
    (report,) = json.loads(shown[shown.index("[\n") :])
    assert list(report["speed_ups"])[:2] == ["nn.Conv2d", "ProjectionConv2d"]
    assert list(report) == [field.name for field in fields(Report)]
    main([*BENCHMARK, "--warmup", "0", "--inference", "true", "--batch_sizes", "[1, 3]"])
    titles = re.findall(r"^uint8 images to labels, .*", capsys.readouterr().out, re.M)
    assert ["1×1×16×16" in title for title in titles] == [True, False]
    assert ["3×1×16×16" in title for title in titles] == [False, True]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "rounds must be at least 1, but got 0"),
        (["--warmup", "-1"], "warmup must be at least 0, but got -1"),
        (["--layer", "stem"], "layer must be one of .* but got 'stem'"),
        (["--layer", "stem", "--inference", "true"], "layer applies to training, but inference is true"),
        (["--batch_sizes", "[1, 0]"], r"batch_sizes must be .* at least 1, but got \[1, 0\]"),
        (["--trainer.precision", "64-true"], "precision must be one of 32-true, .*, but got '64-true'"),
        (["--model.class_path", "Nothing"], "Nothing"),
    ],
)
def test_benchmark_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*BENCHMARK, *flags])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
