"""Converted networks in OpenVINO and C: what they compute, and what they refuse."""

import pytest
import torch
from torch import nn

from pcnn_lightning.deploy import Description, compile_c, compile_openvino
from pcnn_lightning.deploy.packed import PackedNetwork
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules import BNN, PCNN
from pcnn_lightning.modules.conversion import describe_conversion

RUNTIMES = {"openvino": compile_openvino, "c": compile_c}


def packed(model, size=32):
    """The packed network of a model with running statistics and thresholds of three batches."""
    torch.manual_seed(0)
    for _ in range(3):
        model.train()(torch.randn(4, 3, size, size))
    description = Description(
        family=model.family,
        stage=model.stage,
        backbone=model.hparams["backbone"],
        num_classes=10,
        in_channels=3,
        image_size=(size, size),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        planes=model.planes,
        layer=next(iter(model.one_bit_layers.values())).frozen().options,
        conversion=describe_conversion(model.hparams, model.one_bit_layers),
    )
    return PackedNetwork.of(model.eval().net, description)


@pytest.mark.parametrize("activations", ["real", "sign", "threshold"])
@pytest.mark.parametrize("family", [PCNN, BNN])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_resnet_of_torchvision_has_the_logits_of_torch(runtime, family, activations):
    torch.manual_seed(0)
    network = packed(
        family(
            network="pcnn_lightning.backbones.external.quarter_resnet18",
            small_images=True,
            convert={"activations": activations},
            **({"projections": 1} if family is PCNN else {}),
        )
    )
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = network(network.preprocess(images))
    torch.testing.assert_close(RUNTIMES[runtime](network).logits(images), logits, rtol=1e-4, atol=1e-5)


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
    model = BNN(network=f"{__name__}.Gated", small_images=True)
    with pytest.raises(InputError, match=r"sigmoid.* is neither a module nor a sum"):
        RUNTIMES[runtime](packed(model))
