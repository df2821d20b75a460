"""Exported networks give the same labels as the trained one, in every format."""

import json
import math
import os
import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from agreement import assert_agree
from c_programs import needs
from packed_files import describe as described
from tiny import fit, tiny_trainer
from torch.utils.data import DataLoader, TensorDataset
from trained_networks import IMAGE_SHAPE, MODELS, trained_digits, trained_model

from pcnn_lightning import MCN, PCNN, ImageFolder
from pcnn_lightning.data.datasets import RawBatch
from pcnn_lightning.deploy import (
    Description,
    compile_c,
    compile_openvino,
    freeze,
    load_packed,
    save_c,
    save_onnx,
    save_openvino,
    save_packed,
    save_torch,
)
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import SignActivation
from pcnn_lightning.modules import OneBitClassifier, PackedClassifier, describe
from pcnn_lightning.reports.summary import summarize

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]
KEY = "pcnn_lightning"
PROGRAMS = {"network.onnx": save_onnx, "network.pt2": save_torch}
EXPORTERS = {"network.safetensors": save_packed, "network.xml": save_openvino, **PROGRAMS}


class Exported(NamedTuple):
    """A trained model, its data, its test images and labels, and the folder of its exported files."""

    model: OneBitClassifier
    data: object
    images: torch.Tensor
    labels: torch.Tensor
    folder: Path


def export_all(model, data, folder):
    model.eval()
    for name, save in EXPORTERS.items():
        save(model.net, folder / name, describe(model, data))
    raws = list(data.test_dataloader())
    images, labels = (torch.cat([raw[index] for raw in raws]) for index in (0, 1))
    return Exported(model, data, images, labels, folder)


@pytest.fixture(scope="module", params=["PCNN", "MCN"])
def digits(request, tmp_path_factory):
    """A network after two epochs of digits, the first one ternary for PCNN."""
    model, data = trained_digits(request.param)
    return export_all(model, data, tmp_path_factory.mktemp(request.param))


def run(session, images):
    return session.run(None, {"images": images.numpy()})


def session_with_signs(path):
    """An ONNX session that also returns, after the logits, the inputs of all 1-bit convolutions."""
    model = onnx.load(path)
    made_by = {node.output[0]: node.op_type for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type == "Conv" and made_by.get(node.input[1]) == "Cast":
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.input[0]))
    return onnxruntime.InferenceSession(model.SerializeToString())


@torch.no_grad()
def inputs_of_signs(network, images):
    inputs = []
    hooks = [
        module.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
        for module in network.modules()
        if isinstance(module, SignActivation)
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return [values.numpy() for values in inputs]


def flips_at_ties_only(session, network, raw, normalised, tie=2e-6):
    """Which images (B,) have a sign that differs in ONNX; fail if an image's first such sign is not of a zero.

    Later layers of such an image have other inputs and are not compared. Zero means within float rounding, as the
    inputs of signs are outputs of batch norms, about 1.
    """
    logits, *theirs = run(session, raw)
    same = np.ones(len(raw), bool)
    for values, signs in zip(inputs_of_signs(network, normalised), theirs, strict=True):
        flips = (np.where(values >= 0, 1, -1) != signs) & same[:, None, None, None]
        assert np.abs(values[flips]).max(initial=0) < tie
        same &= ~flips.any(axis=(1, 2, 3))
    np.testing.assert_allclose(logits[same], network(normalised).numpy()[same], rtol=1e-4, atol=1e-4)
    return ~same


@torch.no_grad()
def all_agree(exported, chunk=200):
    """Fail unless each format gives the labels of the trained network; return their accuracy.

    ONNX may give another label to an image with a sign that differs, of which there are few.
    """
    model, data, images, labels, folder = exported
    frozen, packed = freeze(model.net), load_packed(folder / "network.safetensors")
    fast = {"OpenVINO": compile_openvino(folder / "network.xml"), "C": compile_c(packed)}
    program = torch.export.load(folder / "network.pt2").module()
    session = onnxruntime.InferenceSession(folder / "network.onnx")
    within = session_with_signs(folder / "network.onnx")
    right, flipped = 0, dict.fromkeys((*fast, "ONNX", "ONNX, another label"), 0)
    for raw, truth in zip(images.split(chunk), labels.split(chunk), strict=True):
        normalised = data.on_after_batch_transfer(RawBatch(raw), 0)
        logits = model(normalised)
        assert torch.equal(frozen(normalised), logits)
        assert torch.equal(packed(packed.preprocess(raw)), logits)
        assert torch.equal(packed.classify(raw), logits.argmax(1))
        for name, runtime in fast.items():
            assert torch.equal(runtime.classify(raw), logits.argmax(1)), name
            flipped[name] += assert_agree(packed, raw, runtime.classify(raw), runtime.logits(raw))
        assert torch.equal(program(raw), logits)
        flips = flips_at_ties_only(within, frozen, raw, normalised)
        others = run(session, raw)[0].argmax(1) != logits.argmax(1).numpy()
        assert not (others & ~flips).any()
        flipped["ONNX"] += int(flips.sum())
        flipped["ONNX, another label"] += int(others.sum())
        right += int((logits.argmax(1) == truth).sum())
    print(f"of {len(images)} images, with a sign that differs: {flipped}")
    assert max(flipped.values()) <= 0.02 * len(images)
    return right / len(images)


# --- the same labels --------------------------------------------------------------------------------------------


def test_all_agree_on_every_test_image_of_digits(digits):
    assert len(digits.images) == 360
    assert all_agree(digits) > 0.3  # not all of one label


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """100 test images and 200 training images of each class of CIFAR-10, saved as JPEG."""
    archive = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"there is no {archive}")
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(archive) as tar:
        for member in tar:
            split, number = member.name.split("/")[0], re.search(r"(\d+)\.jpg$", member.name)
            if number is not None and int(number[1]) < {"train": 200, "test": 100}[split]:
                tar.extract(member, folder, filter="data")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["PCNN", "MCN"])
def test_all_agree_on_1000_images_of_cifar10(family, cifar, tmp_path):
    torch.manual_seed(0)
    data = ImageFolder(cifar, batch_size=50)
    rates = {"schedule": "constant", "eta1": 0.05}
    model = PCNN(widths=[4, 4, 8, 16], **rates) if family == "PCNN" else MCN(widths=[4, 4, 8, 16], **rates)
    fit(model, data, max_epochs=2)
    exported = export_all(model, data, tmp_path)
    assert len(exported.images) == 1000
    assert all_agree(exported) > 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if not re.match("MCN (wrn|resnet|vgg)", name)])
def test_programs_of_every_backbone(name):
    model = trained_model(name)
    description = described(model)
    for path, save in PROGRAMS.items():
        save(model.net, path, description)
    raw = torch.randint(0, 256, (5, *IMAGE_SHAPE), dtype=torch.uint8)
    with torch.no_grad():
        logits = model((raw - 127.5) / 63.75)
        ours = torch.export.load("network.pt2").module()(raw)
    (theirs,) = run(onnxruntime.InferenceSession("network.onnx"), raw)
    for found in (ours.numpy(), theirs):  # a single differing sign would exceed this
        np.testing.assert_allclose(found, logits.numpy(), rtol=0, atol=1e-5 * float(logits.abs().max()))


# --- the files ---------------------------------------------------------------------------------------------------


def test_signs_are_stored_as_bytes(digits):
    model, _, images, _, folder = digits
    total = summarize(model.net, tuple(images.shape[1:])).total
    found = onnx.load(folder / "network.onnx")
    onnx.checker.check_model(found, full_check=True)
    sizes = {onnx.TensorProto.INT8: 0, onnx.TensorProto.FLOAT: 0}
    for tensor in found.graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += math.prod(tensor.dims)
    assert sizes[onnx.TensorProto.INT8] == total.parameters_1bit
    assert sizes[onnx.TensorProto.FLOAT] <= total.parameters_32bit + 10  # the pixels' mean and similar constants
    states = torch.export.load(folder / "network.pt2").state_dict.values()
    assert sum(tensor.numel() for tensor in states if tensor.dtype == torch.int8) == total.parameters_1bit
    assert sum(tensor.numel() for tensor in states if tensor.dtype != torch.int8) == total.parameters_32bit
    numbers = total.parameters_1bit + 4 * total.parameters_32bit
    assert numbers < (folder / "network.onnx").stat().st_size < numbers + 40_000  # 100 to 300 nodes
    assert numbers < (folder / "network.pt2").stat().st_size < numbers + 200_000


@pytest.mark.parametrize("count", [1, 3])
def test_batch_size_is_dynamic(digits, count):
    images = digits.images[:count]
    session = onnxruntime.InferenceSession(digits.folder / "network.onnx")
    program = torch.export.load(digits.folder / "network.pt2").module()
    assert session.get_inputs()[0].shape == ["batch", 1, 16, 16]
    (theirs,) = run(session, images)
    with torch.no_grad():
        ours = program(images)
    assert theirs.shape == ours.shape == (count, 10)
    np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4)


def test_files_hold_the_description(digits):
    files = {KEY: ""}
    torch.export.load(digits.folder / "network.pt2", extra_files=files)
    metadata = onnxruntime.InferenceSession(digits.folder / "network.onnx").get_modelmeta().custom_metadata_map
    expected = load_packed(digits.folder / "network.safetensors").description
    for text in (files[KEY], metadata[KEY]):
        assert Description.from_dict(json.loads(text)) == expected
    assert expected.family == type(digits.model).__name__
    assert (expected.stage, expected.image_size) == ("binary", (16, 16))
    assert expected.class_names == tuple("0123456789")


@pytest.mark.usefixtures("double_precision")
def test_files_do_not_depend_on_the_default_dtype(digits):
    model, data, _, _, folder = digits
    save_packed(model.net, "network.safetensors", describe(model, data))
    assert Path("network.safetensors").read_bytes() == (folder / "network.safetensors").read_bytes()
    double = type(model)(**model.hparams)
    double.set_stage("binary")
    fit(double, data)
    double.eval()
    assert double.net.classifier.weight.dtype == torch.float64
    assert summarize(double.net, (1, 16, 16)) == summarize(model.net, (1, 16, 16))
    for name, save in EXPORTERS.items():
        save(double.net, name, describe(double, data))
    loaded, images = load_packed("network.safetensors"), digits.images[:5]
    tensors = [*loaded.buffers(), *loaded.parameters()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    with torch.no_grad():
        logits = loaded(loaded.preprocess(images)).numpy()
        ours = torch.export.load("network.pt2").module()(images).numpy()
    (theirs,) = run(onnxruntime.InferenceSession("network.onnx"), images)
    assert logits.dtype == ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(logits, ours)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in EXPORTERS if name != "network.xml"])  # that is two files
def test_files_can_be_written_to_a_pipe(digits, name):
    os.mkfifo("pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit(Path("pipe").read_bytes)
        EXPORTERS[name](digits.model.net, "pipe", describe(digits.model, digits.data))
    assert read.result() == (digits.folder / name).read_bytes()
    assert [path.name for path in Path().iterdir() if path.is_fifo()] == ["pipe"]


def test_files_hold_no_paths_of_this_machine(digits):
    for name in EXPORTERS:
        content = (digits.folder / name).read_bytes()
        assert b"classifier" in content or name == "network.safetensors"  # its text is not compressed
        assert str(ROOT).encode() not in content
        assert b".py" not in content


@pytest.mark.parametrize("digits", ["PCNN"], indirect=True)
def test_files_run_without_this_package(digits):
    folder = digits.folder
    np.save(folder / "images.npy", digits.images[:5].numpy())
    code = """
import sys
sys.modules["pcnn_lightning"] = None
import numpy, onnxruntime
images = numpy.load("images.npy")
(logits,) = onnxruntime.InferenceSession("network.onnx").run(None, {"images": images})
assert "torch" not in sys.modules
import torch
program = torch.export.load("network.pt2").module()
print([logits.argmax(1).tolist(), program(torch.from_numpy(images)).argmax(1).tolist()])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    labels = load_packed(folder / "network.safetensors").classify(digits.images[:5]).tolist()
    assert json.loads(done.stdout) == [labels, labels]


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROGRAMS)
def test_a_description_of_another_network_is_refused(path):
    model = trained_model("PCNN J=4")
    with pytest.raises(InputError, match="the network is not the one of its description"):
        PROGRAMS[path](model.net, path, described(model, stage="ternary"))
    model.net.classifier.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="the network cannot be exported: it holds NaN"):
        PROGRAMS[path](model.net, path, described(model))
    assert not Path(path).exists()


def test_onnx_without_its_packages_names_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model = trained_model("PCNN J=4")
    with pytest.raises(InputError, match=r"onnxscript.*pip install '\.\[onnx\]'"):
        save_onnx(model.net, "network.onnx", described(model))


@pytest.mark.parametrize("path", PROGRAMS)
def test_a_file_is_written_whole_or_not_at_all(path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    Path(path).write_text("what was there before")
    monkeypatch.setattr("os.fsync", full)
    model = trained_model("PCNN J=4")
    with pytest.raises(InputError, match="cannot be written"):
        PROGRAMS[path](model.net, path, described(model))
    assert [file.read_text() for file in Path().iterdir()] == ["what was there before"]


def test_a_packed_network_cannot_be_trained(digits):
    with pytest.raises(InputError, match=r"network\.safetensors is a packed network: it cannot be trained"):
        fit(PackedClassifier(path=str(digits.folder / "network.safetensors")), digits.data)


# --- how a model is described -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "kept"), [(100, True), (130, False)])
def test_long_names_of_classes_are_left_out(length, kept):
    """This bounds the size of a packed file."""
    model = PCNN(backbone="wrn7", widths=[2, 2, 2, 2], num_classes=length)
    names = [f"klasse{index:03}é"[-6:] for index in range(length)]
    data = SimpleNamespace(image_shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, classes=names)
    description = describe(model, data)
    assert description.class_names == (tuple(names) if kept else None)
    save_packed(model.net, "network.safetensors", description)
    assert Path("network.safetensors").stat().st_size - summarize(model.net, (3, 32, 32)).total.bits / 8 < 5000


# --- sizes ------------------------------------------------------------------------------------------------------

SIZES = {
    "digits": (PCNN, {"backbone": "wrn7", "projections": 1, "in_channels": 1, "center_loss_weight": 1e-3}, (1, 16, 16)),
    "cifar": (PCNN, {"projections": 4}, (3, 32, 32)),
    "mcn_cifar": (MCN, {}, (3, 32, 32)),
    "imagenet_resnet18": (PCNN, {"backbone": "resnet18", "projections": 1, "num_classes": 1000}, (3, 224, 224)),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", SIZES)
def test_sizes_in_the_readme(config):
    needs("arm-none-eabi-gcc", "arm-none-eabi-size")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `configs/{config}\.yaml`.*?((?:\| [\d.,]+ ){{6}})\|$", readme, re.M)
    make, arguments, shape = SIZES[config]
    model = make(**arguments)
    batch = TensorDataset(torch.randn(2, *shape), torch.tensor([0, 1]))
    trainer = tiny_trainer(max_steps=1)
    trainer.fit(model, DataLoader(batch, batch_size=2))
    trainer.save_checkpoint("last.ckpt")
    names = tuple(map(str, range(10))) if model.hparams["num_classes"] == 10 else None
    for path, save in {**EXPORTERS, "network.c": save_c}.items():
        save(model.net, path, described(model, shape[1:], class_names=names))
    subprocess.run(["arm-none-eabi-gcc", "-std=c99", "-Os", "-mcpu=cortex-m4", "-c", "network.c"], check=True)
    flash = subprocess.check_output(["arm-none-eabi-size", "network.o"], text=True).split()[6]
    files = [["last.ckpt"], ["network.safetensors"], ["network.xml", "network.bin"], ["network.onnx"], ["network.pt2"]]
    sizes = [sum(Path(file).stat().st_size for file in group) for group in files]
    sizes.insert(3, int(flash))
    found = [float(number.replace(",", "")) for number in row[1].split("|")[1:]]
    assert found == pytest.approx([size / 1000 for size in sizes], rel=0.05)
