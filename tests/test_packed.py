"""Packed files: what comes back, how large they are, their bits read by other means, and files that are refused."""

import dataclasses
import functools
import json
import random
import re
import stat
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_freeze import IMAGE_SHAPE, MODELS, trained, trained_model
from tiny import tiny_digits, tiny_mcn

import pcnn_lightning
from pcnn_lightning import MCN, PCNN
from pcnn_lightning.deploy import Description, FrozenConv2d, freeze, load_packed, packed, save_packed
from pcnn_lightning.errors import InputError
from pcnn_lightning.summary import summarize

ROOT = Path(__file__).parents[1]
KEY = "pcnn_lightning"


def describe(model, image_size=IMAGE_SHAPE[1:], **changes):
    """As the command line does, of a model's hyperparameters and its data's properties."""
    hparams = model.hparams
    channels = hparams["in_channels"]
    fields = {name: hparams[name] for name in ("backbone", "num_classes", "in_channels", "stages")}
    fields |= {name: hparams[name] for name in ("levels", "average") if name in hparams}
    fields |= {"planes": hparams["planes" if "planes" in hparams else "projections"], "stage": model.stage}
    fields |= {"mean": (0.5,) * channels, "std": (0.25,) * channels, "image_size": image_size}
    return Description(**{"family": type(model).__name__, **fields, **changes})


def packed_file(name, path="network.safetensors", **changes):
    model = trained_model(name)
    save_packed(model.net, path, describe(model, **changes))
    return Path(path)


def as_json(content):
    return json.dumps(content, separators=(",", ":"))


@functools.cache
def content_of(name):
    with tempfile.TemporaryDirectory() as folder:
        return packed_file(name, f"{folder}/network.safetensors").read_bytes()


def good_file(name="PCNN J=4"):
    path = Path("network.safetensors")
    path.write_bytes(content_of(name))
    return path


# --- there and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_bit_for_bit_the_frozen_network(name):
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
    assert str(frozen.features).replace("polynomial", "clip") == str(loaded.features)  # a gradient is of training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randn(3, *IMAGE_SHAPE)
    assert torch.equal(loaded(images), frozen(images))


def test_trained_or_frozen_or_loaded_all_give_the_same_file():
    model = trained_model("MCN U=3")
    contents = []
    for network in (model.net, freeze(model.net), None, model.net.train()):
        network = load_packed("network.safetensors") if network is None else network
        save_packed(network, "network.safetensors", describe(model))
        contents.append(Path("network.safetensors").read_bytes())
    assert len(set(contents)) == 1


def test_a_loaded_network_lives_on_after_its_file():
    path = packed_file("PCNN J=4")
    loaded = load_packed(path)
    images = torch.randn(2, *IMAGE_SHAPE)
    before = loaded(images)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded(images), before)


def test_as_the_data_module_feeds_it():
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
def test_images_of_another_kind_are_refused(images):
    network = load_packed(packed_file("PCNN J=1"))
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, 3, 33, 30\), but got"):
        network.classify(images)


# --- the file ---------------------------------------------------------------------------------------------------

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
def test_the_size_is_the_summarys_and_at_most_5_kB(name):
    make, arguments, shape = SIZES[name]
    model = make(**arguments)
    names = tuple(map(str, range(10))) if model.hparams["num_classes"] == 10 else None
    save_packed(model.net, "network.safetensors", describe(model, shape[1:], class_names=names))
    size, counted = Path("network.safetensors").stat().st_size, summarize(model.net, shape).total.bits / 8
    print(f"{name}: {size:,} bytes, {counted:,.0f} counted, {size - counted:,.0f} more")
    assert 0 < size - counted <= 5000
    assert size - counted < 1000  # of names and numbers of the description, and half a byte a layer


def parts_of(path):
    """Metadata, codes and floats of a packed file, read by nothing of safetensors or torch."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    parts = {}
    for name, dtype in (("codes", np.uint8), ("floats", "<f4")):
        start, end = header[name]["data_offsets"]
        parts[name] = np.frombuffer(data[start:end], dtype)
        assert [len(parts[name])] == header[name]["shape"]
    assert set(header["__metadata__"]) == {KEY}
    return json.loads(header["__metadata__"][KEY]), parts["codes"], parts["floats"]


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
    assert header["format_version"] == 1
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


def test_a_place_that_cannot_be_written_to():
    Path("file").write_text("x")
    for path in ("file/network.safetensors", "."):
        with pytest.raises(InputError, match="cannot be written"):
            packed_file("PCNN J=1", path)


# --- what is refused when writing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "wrn22"},
        {"backbone": "vgg_small", "stages": [4, 6, 8]},
        {"num_classes": 11},
        {"in_channels": 1, "mean": [0.5], "std": [0.5]},
        {"stages": None},
        {"stages": [4, 4, 6, 9]},
        {"planes": 1},
        {"stage": "ternary"},
        {"stage": "full_precision"},
        {"family": "MCN"},
    ],
    ids=str,
)
def test_a_description_of_another_network_is_refused(changes):
    with pytest.raises(InputError, match="the network is not the one of its description"):
        packed_file("PCNN J=4", **changes)
    assert list(Path().iterdir()) == []


def test_a_description_of_no_network_is_refused():
    with pytest.raises(InputError, match="no such network: stages must be 4 positive numbers"):
        packed_file("PCNN J=4", stages=[4, 4])


@pytest.mark.parametrize("part", ["features.stem.norm.running_var", "classifier.bias", "features.stage1.0.conv.weight"])
def test_a_network_with_nan_is_refused(part):
    model = trained_model("PCNN J=4")
    model.net.state_dict()[part].view(-1)[0] = torch.nan
    with pytest.raises(InputError, match=r"the network cannot be exported: .*NaN or infinite"):
        save_packed(model.net, "network.safetensors", describe(model))


WRONG = [
    ("family", "ResNet", "PCNN, MCN"),
    ("family", ["PCNN"], "PCNN, MCN"),
    ("stage", "quaternary", "binary, ternary, full_precision"),
    ("backbone", "wrn23", "wrn7, wrn22"),
    ("backbone", None, "wrn7, wrn22"),
    ("backbone", ["wrn7"], "wrn7, wrn22"),
    ("num_classes", 0, "an integer from 1"),
    ("num_classes", -10, "an integer from 1"),
    ("num_classes", 2**20 + 1, "to 1048576"),
    ("num_classes", 10**400, "to 1048576"),
    ("num_classes", 10.0, "an integer from 1"),
    ("num_classes", True, "an integer from 1"),
    ("in_channels", "3", "an integer from 1"),
    ("planes", 0, "an integer from 1"),
    ("image_size", [32], "two integers"),
    ("image_size", [32, 0], "two integers"),
    ("image_size", 32, "two integers"),
    ("mean", [0.5], "3 finite numbers"),
    ("mean", [0.5, 0.5, float("nan")], "3 finite numbers"),
    ("mean", [0.5, 0.5, float("-inf")], "3 finite numbers"),
    ("mean", [10**400] * 3, "3 finite numbers"),
    ("mean", "abc", "3 finite numbers"),
    ("std", [0.5, 0.5, 0], "3 positive numbers"),
    ("std", [0.5, 0.5, -1e-9], "3 positive numbers"),
    ("std", {}, "3 positive numbers"),
    ("stages", [4, 4, 6, -8], "None, or integers from 1"),
    ("stages", [[4]] * 4, "None, or integers from 1"),
    ("stages", "4468", "None, or integers from 1"),
    ("levels", 5, "2, 3, 4"),
    ("levels", 2.0, "2, 3, 4"),
    ("average", 1, "False, True"),
    ("class_names", ["a"], "None, or 10 strings"),
    ("class_names", list(range(10)), "None, or 10 strings"),
    ("class_names", "0123456789", "None, or 10 strings"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_description_is_refused(name, value, allowed):
    right = describe(trained_model("PCNN J=4"))
    with pytest.raises(InputError, match=f"^{name} must be .*{re.escape(allowed)}.*, but is") as error:
        dataclasses.replace(right, **{name: value})
    assert len(str(error.value)) < 300


def test_modulated_networks_have_no_ternary_stage():
    with pytest.raises(InputError, match="stage must be one of binary, full_precision, but is 'ternary'"):
        describe(trained_model("MCN K=4"), stage="ternary")


# --- what is refused when reading -------------------------------------------------------------------------------


def rewrite(path, change_header=None, change_tensors=None, metadata=None, signed=True):
    """The file with another header or other tensors, its checksum (if ``signed``) made to fit."""
    header, _, _ = parts_of(path)
    tensors = load_file(path)
    header = (change_header or (lambda header: header))(header)
    tensors = (change_tensors or (lambda tensors: tensors))(tensors)
    if signed and "crc32" in header and {"codes", "floats"} <= set(tensors):
        text = as_json(header.get("description")).encode()
        header["crc32"] = zlib.crc32(text + tensors["codes"].numpy().tobytes() + tensors["floats"].numpy().tobytes())
    save_file(tensors, path, {KEY: as_json(header)} if metadata is None else metadata)


def refusal(path):
    with pytest.raises(InputError) as error:
        load_packed(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert error.value.__suppress_context__
    return str(error.value)


def without(name):
    return lambda header: {key: value for key, value in header.items() if key != name}


def described(**changes):
    return lambda header: {**header, "description": {**header["description"], **changes}}


def test_the_helper_itself_changes_nothing():
    path = good_file()
    before = path.read_bytes()
    rewrite(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("format_version"), "no metadata"),
        (without("crc32"), "no metadata"),
        (without("description"), "no metadata"),
        (lambda header: [header], "no metadata"),
        (lambda header: {**header, "format_version": 2}, "format version 2, but pcnn_lightning .* reads version 1"),
        (lambda header: {**header, "format_version": "1"}, "format version '1'"),
        (lambda header: {**header, "description": []}, "its description must be an object of average, backbone"),
        (lambda header: {**header, "description": None}, "its description must be an object"),
        (described(hidden=1), "its description must be an object"),
        (described(backbone="wrn23"), "backbone must be one of"),
        (described(backbone="wrn22"), "its network takes codes of U8"),
        (described(stage="full_precision"), "its network takes codes of U8"),
        (described(stage="ternary"), "its network takes codes of U8"),
        (described(num_classes=11), "its network takes floats of F32"),
        (described(stages=[4, 4]), "no such network: stages"),
        (described(planes=3, stages=[2**20] * 4), "its network takes codes"),
        (described(planes=2**20), "its network takes codes"),
        (described(planes=2**20, stages=[2**20] * 4), "no such network|its network takes"),
        (described(planes=2**20, stages=[2**20] * 4, family="MCN"), "no such network|its network takes"),
        (described(backbone="mcn20", planes=2**20, stages=[2**20] * 4), "no such network|its network takes"),
        (described(num_classes=2**20, class_names=None), "its network takes floats"),
        (described(in_channels=2**20, mean=[0] * 2**20, std=[1] * 2**20), "its network takes floats"),
    ]
    + [(described(**{name: value}), f"{name} must be") for name, value, _ in WRONG if value != 10**400],
)
def test_a_wrong_header_is_refused(change, message):
    path = good_file()
    rewrite(path, change)
    assert re.search(message, refusal(path))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "pt"},
        {KEY: ""},
        {KEY: "{"},
        {KEY: "null"},
        {KEY: '"format_version description crc32"'},
        {KEY: "1" * 5000},
        {KEY: "[" * 100_000},
    ],
    ids=lambda metadata: str(metadata)[:30],
)
def test_metadata_that_are_none_of_ours_are_refused(metadata):
    path = good_file()
    rewrite(path, metadata=metadata)
    assert "has no metadata of a packed network" in refusal(path)


def put(name, place, value):
    def change(tensors):
        tensors[name][place] = value
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {"codes": tensors["codes"]}, "must hold the tensors codes and floats"),
        (lambda tensors: {**tensors, "more": torch.zeros(1)}, "must hold the tensors codes and floats"),
        (lambda tensors: {**tensors, "codes": tensors["codes"][:-1]}, r"takes codes of U8 \[\d+\], but it holds U8"),
        (lambda tensors: {**tensors, "codes": torch.cat([tensors["codes"]] * 2)}, "takes codes"),
        (lambda tensors: {**tensors, "codes": tensors["codes"][None]}, "takes codes"),
        (lambda tensors: {**tensors, "codes": tensors["codes"].to(torch.int8)}, "but it holds I8"),
        (lambda tensors: {**tensors, "floats": tensors["floats"].double()}, "but it holds F64"),
        (lambda tensors: {**tensors, "floats": tensors["floats"][:0]}, "takes floats"),
        (put("floats", 5, torch.nan), "NaN or infinite"),
        (put("floats", -1, -torch.inf), "NaN or infinite"),
    ],
)
def test_wrong_tensors_are_refused(change, message):
    path = good_file()
    rewrite(path, change_tensors=change)
    assert re.search(message, refusal(path))


@pytest.mark.parametrize(("name", "code"), [("PCNN ternary", 3), ("MCN U=3", 3 << 4)])
def test_codes_that_stand_for_nothing_are_refused(name, code):
    path = good_file(name)
    rewrite(path, change_tensors=put("codes", 7, code))
    assert re.search(r"features\..*(signs|codes) holds a code that stands for nothing", refusal(path))


@pytest.mark.parametrize("change", [put("codes", 0, 0x55), put("floats", 0, 0.25)])
def test_a_changed_number_shows_in_the_checksum(change):
    path = good_file()
    rewrite(path, change_tensors=change, signed=False)
    assert "its checksum is not that of what it holds" in refusal(path)


def test_a_changed_description_shows_in_the_checksum():
    path = good_file()
    rewrite(path, described(mean=[0.5, 0.5, 0.4]), signed=False)
    assert "its checksum is not that of what it holds" in refusal(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1, -1000])
def test_a_truncated_file_is_refused(keep):
    path = good_file()
    path.write_bytes(path.read_bytes()[:keep])
    assert "is damaged or no packed network" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"x", b"PK\x03\x04" * 100, b"\xff" * 200, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{}"],
)
def test_files_of_other_kinds_are_refused(content):
    path = Path("other.safetensors")
    path.write_bytes(content)
    assert "is damaged or no packed network" in refusal(path)


def test_files_that_cannot_be_opened_are_refused():
    assert refusal(Path("missing.safetensors")) == "there is no packed network missing.safetensors"
    refusal(Path())
    path = good_file()
    path.chmod(0)
    if not path.stat().st_mode & stat.S_IRUSR and not _is_root():
        refusal(path)


def _is_root():
    try:
        Path("network.safetensors").open("rb").close()
    except PermissionError:
        return False
    return True


def fuzz(name, count, seed):
    """Damaged files are refused, and what is not refused is the network: a checksum tells."""
    path = good_file(name)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    expected = load_packed(path).state_dict()
    generator, mutant, refused = random.Random(seed), Path("mutant.safetensors"), 0
    for _ in range(count):
        damaged = bytearray(content)
        kind = generator.randrange(4)
        for _ in range(generator.choice([1, 1, 1, 2, 10])):
            # Half of them in the header, which is a small part of the file.
            place = generator.randrange(8 + length if generator.random() < 0.5 else len(damaged))
            damaged[place] = generator.choice([damaged[place] ^ 1 << generator.randrange(8), generator.randrange(256)])
        if kind == 0:
            del damaged[generator.randrange(len(damaged)) :]
        elif kind == 1:
            place = generator.randrange(len(damaged))
            damaged[place:place] = bytes(generator.randrange(256) for _ in range(generator.choice([1, 8, 100])))
        mutant.write_bytes(damaged)
        try:
            loaded = load_packed(mutant).state_dict()
        except InputError:
            refused += 1
        else:
            assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())
    return refused / count


def test_damage_is_refused():
    assert fuzz("PCNN J=4", 300, seed=0) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PCNN ternary", "MCN U=3", "MCN-1", "U-MCN", "PCNN full precision"])
def test_damage_is_refused_at_length(name):
    assert fuzz(name, 5000, seed=1) > 0.9


# --- without Lightning ------------------------------------------------------------------------------------------


def test_the_example_runs_without_lightning():
    packed_file("PCNN J=4", class_names=[f"class {index}" for index in range(10)])
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("image.png")
    example = re.search(r"::\n\n(.*)", pcnn_lightning.deploy.__doc__, re.DOTALL).group(1)
    code = [line[4:] for line in example.splitlines()]
    assert len([line for line in code if line]) == 10
    assert "\n".join(["```python", *code, "```"]) in (ROOT / "README.md").read_text(encoding="utf-8")
    code += ["import sys", "assert not {'lightning', 'torchmetrics', 'torchvision', 'sklearn'} & set(sys.modules)"]
    command = [sys.executable, "-c", "\n".join(code)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"class \d\n", run.stdout)
