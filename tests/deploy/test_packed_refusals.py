"""Descriptions and packed files that are refused."""

import dataclasses
import random
import re
import stat
import struct
import zlib
from pathlib import Path

import pytest
import torch
from packed_files import KEY, as_json, describe, good_file, packed_file, parts_of
from safetensors.torch import load_file, save_file
from trained_networks import IMAGE_SHAPE, trained_model

from pcnn_lightning.deploy import load_packed, save_packed
from pcnn_lightning.errors import InputError

# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "wrn22"},
        {"backbone": "vgg_small", "widths": [4, 6, 8]},
        {"num_classes": 11},
        {"in_channels": 1, "mean": [0.5], "std": [0.5]},
        {"widths": None},
        {"widths": [4, 4, 6, 9]},
        {"planes": 1},
        {"stage": "ternary"},
        {"stage": "full_precision"},
        {"family": "MCN"},
        {"block": {"two_slopes": True}},
    ],
    ids=str,
)
def test_a_description_of_another_network_is_refused(changes):
    with pytest.raises(InputError, match="the network is not the one of its description"):
        packed_file("PCNN J=4", **changes)
    assert list(Path().iterdir()) == []


def test_an_impossible_description_is_refused():
    with pytest.raises(InputError, match="no such network: widths must be 4 positive whole numbers"):
        packed_file("PCNN J=4", widths=[4, 4])
    with pytest.raises(InputError, match="no such network: two_slopes must be false for backbone mcn8"):
        packed_file("PCNN mcn8", block={"two_slopes": True})


@pytest.mark.parametrize("part", ["features.stem.norm.running_var", "classifier.bias", "features.stage1.0.conv.weight"])
def test_a_network_with_nan_is_refused(part):
    model = trained_model("PCNN J=4")
    model.net.state_dict()[part].view(-1)[0] = torch.nan
    with pytest.raises(InputError, match=r"the network cannot be exported: .*NaN or infinite"):
        save_packed(model.net, "network.safetensors", describe(model))


WRONG = [
    ("family", "ResNet", "PCNN, MCN"),
    ("family", ["PCNN"], "PCNN, MCN"),
    ("stage", "quaternary", "ternary, binary, full_precision"),
    ("backbone", "wrn23", "wrn7, wrn10, wrn22"),
    ("backbone", None, "wrn7, wrn10, wrn22"),
    ("backbone", ["wrn7"], "wrn7, wrn10, wrn22"),
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
    ("mean", [0.5], "3 numbers from -1048576 to 1048576"),
    ("mean", [0.5, 0.5, float("nan")], "3 numbers from"),
    ("mean", [0.5, 0.5, float("-inf")], "3 numbers from"),
    ("mean", [0.5, 0.5, 1e37], "3 numbers from"),
    ("mean", [10**400] * 3, "3 numbers from"),
    ("mean", "abc", "3 numbers from"),
    ("std", [0.5, 0.5, 0], "3 numbers from 1e-06 to 1048576"),
    ("std", [0.5, 0.5, -1e-9], "3 numbers from"),
    ("std", [0.5, 0.5, 1e-320], "3 numbers from"),
    ("std", [0.5, 0.5, 1e-46], "3 numbers from"),
    ("std", [0.5, 0.5, 1e37], "3 numbers from"),
    ("std", {}, "3 numbers from"),
    ("widths", [4, 4, 6, -8], "None, or integers from 1"),
    ("widths", [[4]] * 4, "None, or integers from 1"),
    ("widths", "4468", "None, or integers from 1"),
    ("sign_activations", 1, "False, True"),
    ("block", None, "an object of booleans by activation_threshold, two_slopes"),
    ("block", {"two_slopes": 1}, "an object of booleans"),
    ("block", {"widths": True}, "an object of booleans"),
    ("layer", None, "an object"),
    ("layer", {"scaling": ["layer"]}, "an object"),
    ("layer", {"scaling": 1.0}, "an object"),
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


@pytest.mark.parametrize(("mean", "std"), [(2**20, 1e-6), (-(2**20), 1e-6), (2**20, 2**20)])
def test_extreme_means_and_deviations_give_finite_logits(mean, std):
    network = load_packed(packed_file("PCNN J=4", mean=[mean] * 3, std=[std] * 3))
    assert network.preprocess(torch.full((1, *IMAGE_SHAPE), 255, dtype=torch.uint8)).isfinite().all()


def test_modulated_networks_have_no_ternary_stage():
    with pytest.raises(InputError, match="stage must be one of real, binary, full_precision, but is 'ternary'"):
        describe(trained_model("MCN K=4"), stage="ternary")


# --- reading --------------------------------------------------------------------------------------------------------


def rewrite(path, change_header=None, change_tensors=None, metadata=None, signed=True):
    """Change the header or the tensors of a file; ``signed`` updates its checksum."""
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


def versioned(version):
    return lambda _: {"format_version": version}  # nothing else is known of another version


def described(**changes):
    return lambda header: {**header, "description": {**header["description"], **changes}}


def test_rewrite_without_changes_keeps_the_file():
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
        (
            lambda header: {**header, "description": []},
            "its description must be an object of backbone, block, class_names",
        ),
        (lambda header: {**header, "description": None}, "its description must be an object"),
        (described(hidden=1), "its description must be an object"),
        (described(backbone="wrn22"), "its network takes codes of U8"),
        (described(stage="full_precision"), "its network takes codes of U8"),
        (described(stage="ternary"), "its network takes codes of U8"),
        (described(num_classes=11), "its network takes floats of F32"),
        (described(widths=[4, 4]), "no such network: widths"),
        (described(layer={"scaling": "filter"}), "no such network: scaling must be one of layer, channel, none"),
        (described(layer={"scaling": True}), "no such network: scaling must be one of"),
        (described(layer={"hidden": 1}), "no such network: .*unexpected keyword argument 'hidden'"),
        (described(layer={"scaling": "channel"}), "its network takes floats of F32"),
        (described(family="MCN", layer={"average": False, "levels": 5}), "no such network: levels must be 2, 3, 4"),
        (described(family="MCN", layer={"average": 1}), "no such network: average must be true or false"),
        (described(family="MCN", stage="real", layer={}), "no such network: levels must be None in stage real"),
        (described(planes=3, widths=[2**20] * 4), "its network takes codes"),
        (described(planes=2**20), "its network takes codes"),
        (described(planes=2**20, widths=[2**20] * 4), "no such network|its network takes"),
        (described(planes=2**20, widths=[2**20] * 4, family="MCN"), "no such network|its network takes"),
        (described(backbone="mcn20", planes=2**20, widths=[2**20] * 4), "no such network|its network takes"),
        (described(num_classes=2**20, class_names=None), "its network takes floats"),
        (described(in_channels=2**20, mean=[0] * 2**20, std=[1] * 2**20), "its network takes floats"),
    ]
    + [
        (described(**{name: value}), f"{name} must be")
        for name, value, _ in WRONG
        if value != 10**400 and value not in ("ResNet", "wrn23")
    ],
)
def test_a_wrong_header_is_refused(change, message):
    path = good_file()
    rewrite(path, change)
    assert re.search(message, refusal(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (versioned(3), "has format version 3, but pcnn_lightning .* reads version 2$"),
        (versioned(1), "has format version 1, but pcnn_lightning .* reads version 2$"),
        (versioned("2" * 5000), "has format version '2222.*, but pcnn_lightning .* reads version 2$"),
        (versioned(10**4000), "has format version 10+.*, but pcnn_lightning .* reads version 2$"),
        (
            described(family="Alien"),
            "is of family 'Alien', which is not registered: import the package that registers it$",
        ),
        (described(backbone="wrn23"), "is of backbone 'wrn23', which is not registered"),
        (described(family="y" * 5000), "is of family 'yyy"),
    ],
)
def test_a_file_for_another_version_or_package_is_not_called_damaged(change, message):
    path = good_file()
    rewrite(path, change)
    assert re.search(f"^{re.escape(str(path))} {message}", refusal(path))


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
def test_foreign_metadata_is_refused(metadata):
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
def test_undefined_codes_are_refused(name, code):
    path = good_file(name)
    rewrite(path, change_tensors=put("codes", 7, code))
    assert re.search(r"features\..*(signs|codes) holds a code that stands for nothing", refusal(path))


@pytest.mark.parametrize("change", [put("codes", 0, 0x55), put("floats", 0, 0.25)])
def test_changed_tensors_fail_the_checksum(change):
    path = good_file()
    rewrite(path, change_tensors=change, signed=False)
    assert "its checksum is not that of what it holds" in refusal(path)


def test_a_changed_description_fails_the_checksum():
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


# --- random damage --------------------------------------------------------------------------------------------------


def fuzz(name, count, seed):
    """The share of damaged files that are refused; the others must load as the original network."""
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
def test_damage_is_refused_in_many_trials(name):
    assert fuzz(name, 5000, seed=1) > 0.9
