"""Networks of torchvision and timm, converted: two training steps, the summary, and every file that is loaded again."""

import functools
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from pcnn_lightning.backbones.external import external_network
from pcnn_lightning.conversion import convert
from pcnn_lightning.deploy import freeze, load_packed, save_onnx, save_packed
from pcnn_lightning.layers import BinaryConv2d
from pcnn_lightning.modules import BNN, MCN, PCNN, describe
from pcnn_lightning.reports import summarize

SIZE = 64
FAMILIES = {
    "PCNN": functools.partial(PCNN, projections=1, stage="ternary"),
    "MCN": functools.partial(MCN, planes=1),
    "BNN": BNN,
}
NETWORKS = {
    "torchvision/resnet18": {},
    "torchvision/resnet50": {"pointwise": True},
    "torchvision/vgg16_bn": {},
    "torchvision/mobilenet_v2": {"pointwise": True},
    "torchvision/densenet121": {"pointwise": True},
    "torchvision/efficientnet_b0": {"pointwise": True},
    "torchvision/googlenet": {"pointwise": True},
    "torchvision/shufflenet_v2_x1_0": {"pointwise": True},
    "timm/resnet18d": {},
    "timm/resnext50_32x4d": {"include": "re:layer.*conv[123]"},
    "timm/convnext_tiny": {"include": "re:stages.*"},
    "timm/mobilenetv3_small_100": {"pointwise": True},
}
GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "converting.md"
QUICK = ("torchvision/resnet18",)


def cases():
    for name in NETWORKS:
        for family in FAMILIES:
            slow = () if name in QUICK else pytest.mark.slow
            yield pytest.param(name, family, marks=slow, id=f"{name.rpartition('/')[2]}-{family}")


@pytest.mark.parametrize(("name", "family"), cases())
@pytest.mark.filterwarnings("ignore:only .* of the weights of convolutions")
def test_a_network_is_trained_frozen_packed_and_exported(name, family, tmp_path):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = FAMILIES[family](backbone=name, num_classes=5, convert=NETWORKS[name])
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: layer.weight.detach().clone() for name, layer in model.one_bit_layers.items()}
    for _ in range(2):  # in the first step, blocks that begin as identities have no gradient
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
    model.eval()
    assert all(not torch.equal(layer.weight, before[name]) for name, layer in model.one_bit_layers.items())

    total = summarize(model.net, (3, SIZE, SIZE)).total
    weights = sum(layer.weights for layer in model.conversion.converted)
    assert (total.parameters_2bit if family == "PCNN" else total.parameters_1bit) == weights

    data = SimpleNamespace(image_shape=(3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.25,) * 3)
    description = describe(model, data)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(freeze(model.net)(images), expected)
        save_packed(model.net, tmp_path / "packed.safetensors", description)
        packed = load_packed(tmp_path / "packed.safetensors")
        assert torch.equal(packed(images), expected)
        assert (tmp_path / "packed.safetensors").stat().st_size < 1.1 * total.bits / 8 + 20_000

        save_onnx(model.net, tmp_path / "network.onnx", description)
        session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
        pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
        (logits,) = session.run(None, {"images": pixels.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), packed(packed.preprocess(pixels)), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:only .* of the weights of convolutions")
def test_the_guide_has_the_shares_of_each_network(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    (line,) = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name}")]
    with torch.device("meta"):
        network = external_network(name, 5, 3)
    report = convert(network, BinaryConv2d, **NETWORKS[name])
    shares = [report.share_of_convolution_weights, report.share_of_weights, report.share_of_macs]
    cells = [cell.strip() for cell in line.strip("|").split("|")][2:]
    assert cells == [str(len(report.converted)), *(f"{100 * share:.1f} %" for share in shares)]
