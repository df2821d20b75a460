"""Converted networks in OpenVINO and C: what they compute, and what they refuse."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pcnn_lightning.backbones.external import quarter_resnet18
from pcnn_lightning.deploy import compile_c, compile_openvino, load_packed, save_packed
from pcnn_lightning.deploy.packed import PackedNetwork
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules import BNN, MCN, PCNN, describe

RUNTIMES = {"openvino": compile_openvino, "c": compile_c}


def packed(model, size=32):
    """The packed network of a model with running statistics and thresholds of three batches."""
    torch.manual_seed(0)
    for _ in range(3):
        model.train()(torch.randn(4, 3, size, size))
    data = SimpleNamespace(image_shape=(3, size, size), mean=(0.5,) * 3, std=(0.25,) * 3)
    return PackedNetwork.of(model.eval().net, describe(model, data))


@pytest.mark.parametrize("activations", ["real", "sign", "threshold"])
@pytest.mark.parametrize("family", [PCNN, BNN])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_resnet_of_torchvision_has_the_logits_of_torch(runtime, family, activations):
    torch.manual_seed(0)
    network = packed(
        family(
            network="pcnn_lightning.backbones.external.quarter_resnet18",
            convert={"activations": activations},
            **({"projections": 1} if family is PCNN else {}),
        )
    )
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = network(network.preprocess(images))
    torch.testing.assert_close(RUNTIMES[runtime](network).logits(images), logits, rtol=1e-4, atol=1e-5)


OVERRIDES = {
    "planes of PCNN": (PCNN, {"projections": 4}),
    "planes of MCN": (MCN, {"planes": 2, "average": True}),
    "scales": (BNN, {"scaling": "channel"}),
}


@pytest.mark.parametrize(("family", "options"), OVERRIDES.values(), ids=OVERRIDES)
def test_a_packed_file_knows_the_layers_with_arguments_of_their_own(family, options, tmp_path):
    own = {"PCNN": {"projections": 1}}.get(family.family, {})
    network = "pcnn_lightning.backbones.external.quarter_resnet18"
    model = family(network=network, convert={"overrides": {"layer4.*": options}}, **own)
    save_packed(model.net, tmp_path / "network.safetensors", packed(model).description)
    loaded = load_packed(tmp_path / "network.safetensors", network=partial(quarter_resnet18, 10, 3))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


class Gated(nn.Module):
    """A network with a product, which neither runtime is told how to compute."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.stem, self.main = nn.Conv2d(in_channels, 4, 3), nn.Conv2d(4, 4, 3)
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)

    def forward(self, images):
        x = self.main(self.stem(images))
        return self.head(self.flatten(self.pool(x * x.sigmoid())))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_has_no_translation_is_named(runtime):
    model = BNN(network=f"{__name__}.Gated")
    with pytest.raises(InputError, match=r"sigmoid.* is neither a module nor a sum"):
        RUNTIMES[runtime](packed(model))
