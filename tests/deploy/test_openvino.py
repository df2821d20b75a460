"""OpenVINO gives the labels of the frozen network: layer by layer, for whole networks, and from exported files."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from agreement import logits_of
from openvino_networks import agree, binary_convolutions, raw_images
from packed_files import describe as described
from trained_networks import IMAGE_SHAPE, MODELS, WIDTHS, trained_digits, trained_model

from pcnn_lightning import BNN
from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.backbones.mcn import PlaneConv
from pcnn_lightning.data.datasets import RawBatch
from pcnn_lightning.deploy import Description, PackedNetwork, load_packed, save_packed
from pcnn_lightning.deploy.openvino import compile_openvino, save_openvino, to_openvino
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import FrozenBatchNorm2d, FrozenConv2d
from pcnn_lightning.modules import describe

openvino = pytest.importorskip("openvino")

ROOT = Path(__file__).parents[2]


# --- networks ----------------------------------------------------------------------------------------------------


def packed(model):
    return PackedNetwork.of(model.net, described(model))


def of_whole_bytes(backbone):
    """A network of which all convolutions of signs are binary ones: their inputs have multiples of 8 channels."""
    widths = {backbone: [4 * width for width in WIDTHS[backbone]]}  # of two planes each
    with patch.dict(WIDTHS, widths):
        return packed(trained_model(f"PCNN {backbone}"))


LARGE = re.compile(r"resnet34|wrn40|mcn20|MCN (wrn|resnet|vgg)")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if LARGE.search(name) else []) for name in MODELS]
)
def test_networks_of_every_kind(name):
    network = packed(trained_model(name))
    classifier = compile_openvino(network)
    flipped = sum(agree(network, raw_images(batch), classifier) for batch in (7, 1))
    assert flipped <= 1


@pytest.mark.parametrize(
    "backbone", [pytest.param(name, marks=[pytest.mark.slow] if LARGE.search(name) else []) for name in BACKBONES]
)
def test_binary_networks_of_every_backbone(backbone):
    network = of_whole_bytes(backbone)
    factors = torch.cat([module.scale for module in network.modules() if isinstance(module, FrozenBatchNorm2d)])
    assert (factors < 0).float().mean() > 0.1
    ordinary = sum(isinstance(module, PlaneConv) for module in network.modules())
    layers = [module for module in network.modules() if isinstance(module, FrozenConv2d)]
    if backbone.startswith("mcn"):
        ordinary += 1  # the first convolution is of images
    assert binary_convolutions(to_openvino(network)) == len(layers) - ordinary
    classifier = compile_openvino(network)
    flipped = sum(agree(network, raw_images(batch), classifier) for batch in (7, 1))
    assert flipped <= 2
    print(f"{flipped} of 8 images with a sign that differs")


@pytest.mark.parametrize("scaling", ["channel", "layer", "none"])
def test_plain_binary_networks(scaling):
    torch.manual_seed(0)
    model = BNN(backbone="wrn7", widths=[8, 8, 16, 24], scaling=scaling, in_channels=3).eval()
    data = SimpleNamespace(image_shape=IMAGE_SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = PackedNetwork.of(model.net, describe(model, data))
    assert agree(network, raw_images(7)) == 0


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", ["PCNN wrn7", "PCNN mcn_small", "MCN U=3"])
def test_networks_do_not_depend_on_the_default_dtype(name):
    model = trained_model(name)
    agree(packed(model), raw_images(3))


@pytest.fixture(scope="module", params=["PCNN", "MCN"])
def digits(request, tmp_path_factory):
    """A trained network of digits, its 360 test images, and the folder of its exported files."""
    model, data = trained_digits(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    save_openvino(model.net, folder / "network.xml", describe(model, data))
    save_packed(model.net, folder / "network.safetensors", describe(model, data))
    batches = list(data.test_dataloader())
    images, truth = (torch.cat([batch[index] for batch in batches]) for index in (0, 1))
    normalised = data.on_after_batch_transfer(RawBatch(images), 0)
    with torch.no_grad():
        logits = model(normalised)
    return SimpleNamespace(model=model, data=data, images=images, truth=truth, logits=logits, folder=folder)


@pytest.mark.parametrize("source", ["network.xml", "network.safetensors"])
def test_labels_of_all_test_digits(digits, source):
    classifier = compile_openvino(digits.folder / source)
    network = load_packed(digits.folder / "network.safetensors")
    assert len(digits.images) == 360
    assert torch.equal(logits_of(network, digits.images), digits.logits)
    flipped = agree(network, digits.images, classifier)
    print(f"{flipped} of 360 images with a sign that differs")
    assert torch.equal(classifier.classify(digits.images), digits.logits.argmax(1))
    assert (classifier.classify(digits.images) == digits.truth).float().mean() > 0.3
    assert classifier.description == network.description


# --- the classifier ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 16, 17, 45])
def test_batches_of_any_size(batch):
    network = packed(trained_model("PCNN J=4"))
    classifier, images = compile_openvino(network), raw_images(batch)
    assert torch.equal(classifier.classify(images), network.classify(images))
    assert classifier.logits(images).shape == (batch, 10)


def test_images_in_another_layout():
    network = packed(trained_model("PCNN J=4"))
    classifier, images = compile_openvino(network), raw_images(3)
    transposed = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(classifier.logits(transposed), classifier.logits(images))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, *IMAGE_SHAPE),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(IMAGE_SHAPE, dtype=torch.uint8),
    ],
)
def test_wrong_images_are_refused(images):
    network = packed(trained_model("PCNN J=4"))
    for classify in (compile_openvino(network).classify, network.classify):
        with pytest.raises(ValueError, match=r"images must be uint8 of shape \(B, 3, 33, 30\), but got torch\."):
            classify(images)


@pytest.mark.parametrize("threads", [0, 1.5, True])
def test_wrong_threads_are_refused(threads):
    with pytest.raises(ValueError, match="threads must be an integer of at least 1"):
        compile_openvino(packed(trained_model("PCNN J=4")), threads)


def test_threads_share_a_classifier():
    network = packed(trained_model("PCNN J=4"))
    classifier, parts = compile_openvino(network, 2), [raw_images(batch, seed=batch) for batch in range(1, 9)] * 5
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(classifier.classify, parts))
    assert all(torch.equal(labels, network.classify(images)) for labels, images in zip(found, parts, strict=True))


FORKED = """
import os, sys, threading
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(2)
torch.rand(1_000_000).exp()  # starts torch's threads
from trained_networks import IMAGE_SHAPE, trained_model
from packed_files import describe
from pcnn_lightning.deploy import PackedNetwork
from pcnn_lightning.deploy.openvino import compile_openvino
model = trained_model("PCNN J=4")
network = PackedNetwork.of(model.net, describe(model))
classifier, other = compile_openvino(network, 2), compile_openvino(network, 1)
images = torch.randint(0, 256, (7, *IMAGE_SHAPE), dtype=torch.uint8)
labels = classifier.classify(images)
other.classify(images)
classifier._lock.acquire()  # as if another thread were at work
child = os.fork()
if not child:
    del other
    right = classifier.classify(images).tolist() == labels.tolist()
    torch.set_num_threads(1)  # torch's own threads do not survive a fork, and the parent has used them
    right = right and torch.equal(compile_openvino(network, 2).classify(images[:5]), labels[:5])
    sys.exit(0 if right else 3)
classifier._lock.release()
_, status = os.waitpid(child, 0)
assert torch.equal(classifier.classify(images), labels)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore")
def test_a_forked_process_goes_on_and_ends_also_without_a_home():
    code = FORKED.format(paths=[str(ROOT / "tests"), str(ROOT / "tests" / "deploy"), str(ROOT)])
    environment = {**os.environ, "HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("machine", "name", "count"), [("aarch64", 1, 1), ("aarch64", 0, 0), ("x86_64", 1, 0)])
def test_processors_without_binary_convolutions_are_warned_about(machine, name, count, monkeypatch):
    network = of_whole_bytes("wrn7") if name else packed(trained_model("MCN K=1"))
    monkeypatch.setattr("platform.machine", lambda: machine)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        for _ in range(2):
            compile_openvino(network)
    found = [(str(warning.message), Path(warning.filename).name) for warning in record]
    message = "OpenVINO has fast binary convolutions on x86 only, and a slow reference on aarch64"
    assert found == [(message, "test_openvino.py")] * count


def test_openvino_is_imported_lazily():
    code = "import sys, pcnn_lightning.deploy.openvino; assert 'openvino' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_openvino_is_reported(monkeypatch):
    model = trained_model("PCNN J=4")
    network = packed(model)
    monkeypatch.setitem(sys.modules, "openvino", None)
    pattern = r"OpenVINO is not installed \(.*\): pip install '\.\[openvino\]'"
    for use in (
        lambda: compile_openvino(network),
        lambda: to_openvino(network),
        lambda: save_openvino(model.net, "network.xml", described(model)),
    ):
        with pytest.raises(InputError, match=pattern):
            use()


# --- the files ---------------------------------------------------------------------------------------------------


def test_files_hold_the_description(digits):
    model = openvino.Core().read_model(digits.folder / "network.xml")
    text = model.get_rt_info(["pcnn_lightning", "description"]).astype(str)
    expected = load_packed(digits.folder / "network.safetensors").description
    assert Description.from_dict(json.loads(text)) == expected
    assert expected.class_names == tuple("0123456789")
    (images,), (logits,) = model.inputs, model.outputs
    assert images.get_names() == {"images"}
    assert logits.get_names() == {"logits"}
    assert (images.get_element_type(), list(images.shape)) == (openvino.Type.u8, [1, 1, 16, 16])


def test_names_of_classes_are_kept_whatever_they_are():
    names = ('a "quoted" <b> & é\n', *"123456789")
    model = trained_model("PCNN J=4")
    save_openvino(model.net, "network.xml", described(model, class_names=names))
    assert compile_openvino("network.xml").description.class_names == names


def test_signs_are_stored_as_bits():
    model = trained_model("PCNN ternary")
    ternary = packed(model)
    for network, bits in ((of_whole_bytes("wrn7"), 1), (packed(trained_model("PCNN J=1")), 1), (ternary, 2)):
        save_openvino(network, "network.xml", network.description)
        tensors = [*network.parameters(), *network.buffers()]
        signs = sum(tensor.numel() for tensor in tensors if tensor.dtype == torch.int8)
        floats = sum(tensor.numel() for tensor in tensors if tensor.dtype == torch.float32)
        found = Path("network.bin").stat().st_size
        # Signs of several consumers have thresholds as well as 0 and 1 for each channel.
        assert signs * bits / 8 + 4 * (floats - 10) < found < signs * bits / 8 + 4 * floats * 1.6 + 1000


def test_files_are_always_the_same_and_hold_no_paths(digits):
    model, folder = digits.model, digits.folder
    save_openvino(model.net, "other.xml", describe(model, digits.data))
    for ending in (".xml", ".bin"):
        assert Path(f"other{ending}").read_bytes() == (folder / f"network{ending}").read_bytes()
    content = (folder / "network.xml").read_text()
    assert "features.stage1.0.conv" in content
    assert not re.search(r"/tmp|\.py|\.bin", content)


def test_files_run_without_torch_and_this_package(digits):
    np.save("images.npy", digits.images[:5].numpy())
    code = f"""
import sys
sys.modules["pcnn_lightning"] = sys.modules["torch"] = None
import json, numpy, openvino
core = openvino.Core()
model = core.read_model({str(digits.folder / "network.xml")!r})
names = json.loads(model.get_rt_info(["pcnn_lightning", "description"]).astype(str))["class_names"]
images = numpy.load("images.npy")
one = core.compile_model(model, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
labels = [int(one(image[None])["logits"].argmax()) for image in images]
model.reshape([len(images), *model.input().shape[1:]])
all = core.compile_model(model, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
print(json.dumps([labels, all(images)["logits"].argmax(1).tolist(), [names[label] for label in labels]]))
"""
    environment = {**os.environ, "HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    labels = digits.logits[:5].argmax(1).tolist()
    assert json.loads(done.stdout) == [labels, labels, list(map(str, labels))]


def test_files_are_written_whole_or_not_at_all(monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    files = [Path("network.xml"), Path("network.bin")]
    for file in files:
        file.write_text("what was there before")
    monkeypatch.setattr("os.fsync", full)
    model = trained_model("PCNN J=4")
    with pytest.raises(InputError, match=r"network\.bin cannot be written"):
        save_openvino(model.net, "network.xml", described(model))
    assert sorted(Path().iterdir()) == sorted(files)
    assert all(file.read_text() == "what was there before" for file in files)


def test_other_networks_and_paths_are_refused():
    model = trained_model("PCNN J=4")
    with pytest.raises(InputError, match=r"written as NAME\.xml and NAME\.bin, but the path is network\.onnx"):
        save_openvino(model.net, "network.onnx", described(model))
    with pytest.raises(InputError, match="the network is not the one of its description"):
        save_openvino(model.net, "network.xml", described(model, stage="ternary"))
    model.net.classifier.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="the network cannot be exported: it holds NaN"):
        save_openvino(model.net, "network.xml", described(model))
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda xml, weights: (None, weights), r"there is no network\.xml"),
        (lambda xml, weights: (xml, None), r"there is no network\.bin"),
        (lambda xml, weights: (b"", weights), r"network\.xml is damaged or no exported network"),
        (lambda xml, weights: (b"hello", weights), r"network\.xml is damaged or no exported network"),
        (lambda xml, weights: (xml[:-500], weights), r"network\.xml is damaged or no exported network"),
        (lambda xml, weights: (xml.replace(b"<pcnn", b"<q").replace(b"</pcnn", b"</q"), weights), "is damaged or no"),
        (lambda xml, weights: (xml.replace(b"PCNN", b"PKNN"), weights), "family must be one of"),
        (lambda xml, weights: (xml, weights[:-5]), r"network\.xml is damaged or no exported network"),
        (lambda xml, weights: (xml, weights[:-1] + b"?"), r"network\.bin is damaged, or of another network"),
    ],
)
def test_damaged_files_are_refused(change, message):
    model = trained_model("PCNN J=4")
    save_openvino(model.net, "network.xml", described(model))
    files = Path("network.xml"), Path("network.bin")
    for file, content in zip(files, change(*(file.read_bytes() for file in files)), strict=True):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        compile_openvino("network.xml")
    assert "\n" not in str(refused.value)


# --- other processors --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell"])
def test_processors_without_avx512(processor):
    """SSE 4.2 and AVX2, emulated."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("there is no qemu-x86_64")
    for backbone in ("vgg_small", "resnet18_cifar", "mcn_small"):
        network = of_whole_bytes(backbone)
        save_openvino(network, f"{backbone}.xml", network.description)
        np.save(f"{backbone}.npy", logits_of(network, raw_images(2)).numpy())
    np.save("images.npy", raw_images(2).numpy())
    code = """
import numpy, openvino
for backbone in ("vgg_small", "resnet18_cifar", "mcn_small"):
    core = openvino.Core()
    model = core.read_model(f"{backbone}.xml")
    model.reshape([2, *model.input().shape[1:]])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    logits = request.infer([numpy.load("images.npy")])["logits"]
    numpy.testing.assert_allclose(logits, numpy.load(f"{backbone}.npy"), atol=1e-4)
    print({entry.exec_type for entry in request.profiling_info if entry.node_type == "BinaryConvolution"})
"""
    command = [emulator, "-cpu", processor, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{{'jit_{ {'Nehalem': 'sse42', 'Haswell': 'avx2'}[processor] }_u1'}}"] * 3
