"""Packed files: round trips, sizes and the format."""

import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_files import as_json, describe, packed_file, parts_of
from PIL import Image
from tiny import tiny_digits, tiny_mcn
from trained_networks import IMAGE_SHAPE, MODELS, trained, trained_model

import pcnn_lightning
from pcnn_lightning import MCN, PCNN
from pcnn_lightning.deploy import freeze, load_packed, packed, save_packed
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import FrozenConv2d
from pcnn_lightning.reports.summary import summarize

# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_network_is_the_frozen_one_bit_for_bit(name):
    model = trained_model(name)
    frozen, description = freeze(model.net), describe(model)
    save_packed(model.net, "network.safetensors", description)
    loaded = load_packed("network.safetensors")
    assert loaded.description == description
    assert not loaded.training
    states = frozen.state_dict(), loaded.state_dict()
    assert list(states[0]) == list(states[1])
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key])
        assert tensor.dtype == states[1][key].dtype
    assert str(frozen.features).replace("polynomial", "clip") == str(loaded.features)  # only used in training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randn(3, *IMAGE_SHAPE)
    assert torch.equal(loaded(images), frozen(images))


def test_trained_frozen_and_loaded_networks_give_the_same_file():
    model = trained_model("MCN U=3")
    contents = []
    for network in (model.net, freeze(model.net), None, model.net.train()):
        network = load_packed("network.safetensors") if network is None else network
        save_packed(network, "network.safetensors", describe(model))
        contents.append(Path("network.safetensors").read_bytes())
    assert len(set(contents)) == 1


def test_a_loaded_network_does_not_depend_on_its_file():
    path = packed_file("PCNN J=4")
    loaded = load_packed(path)
    images = torch.randn(2, *IMAGE_SHAPE)
    before = loaded(images)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded(images), before)


def test_preprocessing_equals_that_of_the_data_module():
    data = tiny_digits(image_size=12)
    data.setup("test")
    raw = next(iter(data.test_dataloader()))
    images, _ = data.on_after_batch_transfer(raw, 0)
    model = tiny_mcn().eval()
    names = {"mean": data.mean, "std": data.std, "class_names": data.classes}
    save_packed(model.net, "network.safetensors", describe(model, image_size=(12, 12), **names))
    loaded = load_packed("network.safetensors")
    assert torch.equal(loaded.preprocess(raw.images), images)
    assert torch.equal(loaded.classify(raw.images), model(images).argmax(1))
    assert loaded.description.class_names == tuple("0123456789")
    assert loaded.double().preprocess(raw.images).dtype == torch.float64


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, *IMAGE_SHAPE),
        torch.zeros(IMAGE_SHAPE, dtype=torch.uint8),
        torch.zeros(2, 1, *IMAGE_SHAPE[1:], dtype=torch.uint8),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    ],
    ids=["float", "no batch", "grey", "size"],
)
def test_wrong_images_are_refused(images):
    network = load_packed(packed_file("PCNN J=1"))
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, 3, 33, 30\), but got"):
        network.classify(images)


# --- the file -------------------------------------------------------------------------------------------------------


ROOT = Path(__file__).parents[2]
CIFAR = (3, 32, 32)
SIZES = {
    "resnet18": (PCNN, {"backbone": "resnet18", "projections": 1, "num_classes": 1000}, (3, 224, 224)),
    "resnet18 ternary": (PCNN, {"backbone": "resnet18_cifar", "projections": 1, "stage": "ternary"}, CIFAR),
    "wrn22 J=4": (PCNN, {"projections": 4}, CIFAR),
    "wrn40 J=1": (PCNN, {"backbone": "wrn40", "projections": 1}, CIFAR),
    "wrn22 ternary": (PCNN, {"projections": 4, "stage": "ternary"}, CIFAR),
    "wrn22 full precision": (PCNN, {"projections": 4, "full_precision": True}, CIFAR),
    "digits' wrn7": (PCNN, {"backbone": "wrn7", "projections": 1, "in_channels": 1}, (1, 16, 16)),
    "mcn20": (MCN, {}, CIFAR),
    "mcn20 MCN-1": (MCN, {"average": True}, CIFAR),
    "mcn20 U=3": (MCN, {"levels": 3}, CIFAR),
    "mcn20 U=4": (MCN, {"levels": 4}, CIFAR),
    "mcn20 U-MCN": (MCN, {"binarize": False}, CIFAR),
    "mcn_small": (MCN, {"backbone": "mcn_small"}, CIFAR),
}


@pytest.mark.parametrize("name", SIZES)
def test_size_is_that_of_the_summary_and_at_most_5_kB(name):
    make, arguments, shape = SIZES[name]
    model = make(**arguments)
    names = tuple(map(str, range(10))) if model.hparams["num_classes"] == 10 else None
    save_packed(model.net, "network.safetensors", describe(model, shape[1:], class_names=names))
    size, counted = Path("network.safetensors").stat().st_size, summarize(model.net, shape).total.bits / 8
    print(f"{name}: {size:,} bytes, {counted:,.0f} counted, {size - counted:,.0f} more")
    assert 0 < size - counted <= 5000
    assert size - counted < 1000  # the description, and half a byte a layer


@pytest.mark.parametrize("name", ["PCNN J=1", "PCNN ternary", "MCN K=1", "MCN U=3", "MCN U=4", "PCNN full precision"])
def test_the_bits_are_where_the_format_says(name):
    path = packed_file(name, num_classes=10)
    header, codes, floats = parts_of(path)
    bits = 1 if name in ("PCNN J=1", "MCN K=1") else 2
    frozen = freeze(trained(name))
    for layer in frozen.modules():
        if isinstance(layer, FrozenConv2d):
            values = (layer.codes if "U=" in name else layer.signs).flatten().numpy()
            size = -(-len(values) * bits // 8)
            each = np.unpackbits(codes[:size], bitorder="little").reshape(-1, bits) @ (1 << np.arange(bits))
            expected = {-1: 0, 1: 1} if bits == 1 else {0: 0, 1: 1, 2: 2, 3: 3} if "U=" in name else {-1: 0, 0: 1, 1: 2}
            assert each[: len(values)].tolist() == [expected[value] for value in values.tolist()]
            assert not each[len(values) :].any()
            codes = codes[size:]
    assert len(codes) == 0
    stored = [tensor.flatten() for tensor in frozen.state_dict().values() if tensor.dtype == torch.float32]
    assert floats.tolist() == torch.cat(stored).tolist()
    assert header["format_version"] == 2
    assert header["package_version"] == pcnn_lightning.__version__
    assert set(header) == {"format_version", "package_version", "description", "crc32"}
    text = as_json(header["description"]).encode()
    _, codes, floats = parts_of(path)
    assert header["crc32"] == zlib.crc32(text + codes.tobytes() + floats.tobytes())
    assert header["description"]["backbone"] == ("mcn8" if name.startswith("MCN") else "wrn7")


def test_class_names_of_any_script():
    names = ["katt", "犬", "ψ\n", '"', "", "\udce9", "\x00", "a" * 300, "🐎", "9"]
    assert load_packed(packed_file("PCNN J=1", class_names=names)).description.class_names == tuple(names)


def test_a_file_is_written_whole_or_not_at_all(monkeypatch):
    path = packed_file("PCNN J=1", "folder/of/its/own/network.safetensors")
    before = path.read_bytes()
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(packed.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"network.safetensors cannot be written \(No space left on device\)"):
        packed_file("PCNN ternary", path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_paths_that_cannot_be_written():
    Path("file").write_text("x")
    for path in ("file/network.safetensors", "."):
        with pytest.raises(InputError, match="cannot be written"):
            packed_file("PCNN J=1", path)


# --- without Lightning ----------------------------------------------------------------------------------------------


def test_the_example_runs_without_lightning():
    packed_file("PCNN J=4", "digits.safetensors", class_names=[f"class {index}" for index in range(10)])
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("image.png")
    example = re.search(r"::\n\n(.*)", pcnn_lightning.deploy.__doc__, re.DOTALL).group(1)
    code = [line[4:] for line in example.splitlines()]
    assert len([line for line in code if line]) == 10
    assert "\n".join(["```python", *code, "```"]) in (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    code += ["import sys", "assert not {'lightning', 'torchmetrics', 'torchvision', 'sklearn'} & set(sys.modules)"]
    command = [sys.executable, "-c", "\n".join(code).replace('"L"', '"RGB"')]  # this network takes color images
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"class \d\n", run.stdout)
