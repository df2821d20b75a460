"""Packed files of small networks, and their parts read without safetensors or torch."""

import functools
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
from trained_networks import IMAGE_SHAPE, trained_model

from pcnn_lightning.deploy import Description, save_packed

KEY = "pcnn_lightning"


def describe(model, image_size=IMAGE_SHAPE[1:], **changes):
    """The description that the command line makes of a model and its data."""
    hparams = model.hparams
    channels = hparams["in_channels"]
    fields = {name: hparams[name] for name in ("backbone", "num_classes", "in_channels", "widths")}
    fields |= {"planes": hparams["planes" if "planes" in hparams else "projections"], "stage": model.stage}
    fields |= {"block": model.block}
    if model.stage == "full_precision":
        fields |= {"sign_activations": False}
    elif "projections" in hparams:
        fields |= {"layer": {"scaling": "layer"}}
    else:
        levels = hparams["levels"] if hparams["binarize"] else None
        fields |= {"sign_activations": False, "layer": {"average": hparams["average"], "levels": levels}}
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


def parts_of(path):
    """Metadata, codes and floats of a packed file, read without safetensors or torch."""
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
