"""A family from outside the package works everywhere: its layer inherits all answers but one."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tiny import tiny_digits, tiny_trainer
from torch import nn
from toy_family import Toy, ToyConv2d

from pcnn_lightning import (
    Diversity,
    FilterCurves,
    FlipRatio,
    GradientNorms,
    KernelHistograms,
    LossCurves,
    StageCheckpoint,
)
from pcnn_lightning.cli import main
from pcnn_lightning.deploy import compile_c, compile_openvino, freeze, load_packed, save_onnx, save_packed, save_torch
from pcnn_lightning.modules import describe
from pcnn_lightning.reports import summarize

ROOT = Path(__file__).parents[1]
WIDTHS = [2, 2, 4, 4]
LAYERS = {"features.stage1.0.conv": (2, 2), "features.stage2.0.conv": (2, 4), "features.stage3.0.conv": (4, 4)}
BITS = sum(9 * inputs * outputs for inputs, outputs in LAYERS.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained network, its data, and the folder of its logs."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model, data = Toy(in_channels=1, widths=WIDTHS, schedule="constant", eta1=0.05), tiny_digits()
    recorders = [LossCurves(), KernelHistograms(), FlipRatio(), FilterCurves(), Diversity(), GradientNorms()]
    trainer = tiny_trainer(
        max_epochs=2,
        logger=TensorBoardLogger(folder, name="", version="logs"),
        enable_checkpointing=True,
        callbacks=[*recorders, StageCheckpoint(dirpath=str(folder / "checkpoints"))],
        log_every_n_steps=1,
    )
    trainer.fit(model, datamodule=data)
    return model.eval(), data, folder


def test_its_layer_is_small():
    own = {name for name in vars(ToyConv2d) if not name.startswith("__")}
    assert own == {"quantize"}


def test_it_has_one_learning_rate(run):
    model, _, _ = run
    assert list(model.parameter_groups()) == ["kernels", "others"]
    assert list(model.group_settings(model.hparams)) == ["kernels", "others"]
    assert "eta2" not in model.hparams


def test_summary_counts_its_bits(run):
    model, _, _ = run
    total = summarize(model.net, (1, 8, 8)).total
    scales = sum(outputs for _, outputs in LAYERS.values())
    others = sum(
        2 * module.num_features if isinstance(module, nn.BatchNorm2d) else sum(p.numel() for p in module.parameters())
        for module in model.net.modules()
        if not isinstance(module, ToyConv2d) and not list(module.children())
    )
    assert (total.parameters_1bit, total.parameters_2bit) == (BITS, 0)
    assert total.parameters_32bit == others + scales
    areas = (8 * 8, 4 * 4, 2 * 2)
    macs = sum(9 * inputs * outputs * area for (inputs, outputs), area in zip(LAYERS.values(), areas, strict=True))
    assert total.macs_1bit == macs


def test_frozen_network_has_no_latent_weights(run):
    model, _, _ = run
    frozen = freeze(model.net)
    held = {name: tensor.dtype for name, tensor in frozen.state_dict().items()}
    assert {name: held[f"{name}.signs"] for name in LAYERS} == dict.fromkeys(LAYERS, torch.int8)
    assert not any(f"{name}.weight" in held for name in LAYERS)
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=0, atol=0)


def test_files_agree_with_the_trained_network(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, data, _ = run
    data.setup("test")
    images = data.test_set.images[:40]
    description = describe(model, data)
    with torch.no_grad():
        expected = model(data.on_after_batch_transfer(data.test_set.__getitems__(list(range(40))), 0)[0])

    save_packed(model.net, tmp_path / "toy.safetensors", description)
    packed = load_packed(tmp_path / "toy.safetensors")
    torch.testing.assert_close(packed(packed.preprocess(images)), expected, rtol=0, atol=0)
    for fast in (compile_openvino(packed), compile_c(packed)):
        assert torch.equal(fast.classify(images), expected.argmax(1))

    save_torch(model.net, tmp_path / "toy.pt2", description)
    exported = torch.export.load(tmp_path / "toy.pt2").module()
    torch.testing.assert_close(exported(images), expected, rtol=0, atol=0)

    save_onnx(model.net, tmp_path / "toy.onnx", description)
    session = onnxruntime.InferenceSession(tmp_path / "toy.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    assert (torch.from_numpy(logits).argmax(1) == expected.argmax(1)).all()


def test_every_callback_draws(run):
    _, _, folder = run
    pictures = {path.stem for path in (folder / "logs").glob("*.png")}
    assert pictures == {"losses", "kernels_last", "kernels_over_epochs", "flips", "filters", "diversity_binary"}
    for name in ("losses", "kernels", "flips", "filters"):
        with (folder / "logs" / f"{name}.csv").open() as file:
            assert len(list(csv.DictReader(file))) >= 2
    with (folder / "logs" / "flips.csv").open() as file:
        assert {row["layer"] for row in csv.DictReader(file)} >= set(LAYERS)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"binary.ckpt", "last.ckpt", "stages.json"}


@pytest.mark.parametrize("more", [[], ["--layer=features.stage2.0.conv"], ["--inference=true", "--batch_sizes=[1]"]])
def test_benchmark_runs(more, capsys):
    flags = ["--model.widths=[2,2,4,4]", "--data=Digits", "--rounds=1", "--warmup=0"]
    main(["benchmark", "--model=toy_family.Toy", *flags, *more])
    assert "images/s" in capsys.readouterr().out


def test_a_checkpoint_alone_reloads_it(run):
    """In a process of its own that has imported nothing of it."""
    _, _, folder = run
    command = [sys.executable, "-m", "pcnn_lightning", "test", "--data=Digits", "--data.image_size=8"]
    command += ["--ckpt_path", str(folder / "checkpoints" / "binary.ckpt"), "--trainer.logger=false"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "test/accuracy" in done.stdout


def test_an_unregistered_family_is_named(run, tmp_path, monkeypatch):
    from pcnn_lightning.errors import InputError
    from pcnn_lightning.families import FAMILIES

    model, data, _ = run
    save_packed(model.net, tmp_path / "toy.safetensors", describe(model, data))
    monkeypatch.delitem(FAMILIES, "Toy")
    with pytest.raises(InputError, match="is of family 'Toy', which is not registered: import"):
        load_packed(tmp_path / "toy.safetensors")
