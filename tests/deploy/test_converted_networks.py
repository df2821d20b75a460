"""Converted networks in OpenVINO and C: what they compute, and what they refuse."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pcnn_lightning.backbones.external import quarter_resnet18
from pcnn_lightning.deploy import compile_c, compile_openvino, load_packed, save_packed
from pcnn_lightning.deploy.packed import PackedNetwork
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import BinaryConv2d
from pcnn_lightning.modules import BNN, MCN, PCNN, describe

IN_PLACE = ("module", "function", "argument", "alias", "sum")
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


class InPlace(nn.Module):
    """A network that overwrites what it reads again."""

    def __init__(self, kind, num_classes=10, in_channels=3):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
        self.kind = kind

    def forward(self, images):
        x = self.norm(self.stem(images))
        if self.kind == "module":
            y = self.first(self.relu(x))
        elif self.kind == "function":
            y = self.first(F.relu(x, inplace=True))
        elif self.kind == "argument":
            y = self.first(F.relu(x, True))
        elif self.kind == "alias":
            y = self.first(self.relu(self.same(x)))
        else:
            y = self.first(x)
            z = y
            y += x
            return self.head(self.flatten(self.pool(self.second(y) + z)))
        return self.head(self.flatten(self.pool(self.second(y) + x)))


for _kind in IN_PLACE:
    globals()[f"in_place_{_kind}"] = partial(InPlace, _kind)


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_operations_in_place_are_seen_by_whoever_reads_again(runtime, kind):
    torch.manual_seed(0)
    network = packed(BNN(network=f"{__name__}.in_place_{kind}"))
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
    model = BNN(network=f"{__name__}.Gated")
    with pytest.raises(InputError, match=r"sigmoid.* is neither a module nor a sum"):
        RUNTIMES[runtime](packed(model))


class Plain(nn.Module):
    """Convolutions, a batch norm of vectors, and whatever a subclass does."""

    def __init__(self, num_classes=10, in_channels=3):
        super().__init__()
        self.stem, self.main = nn.Conv2d(in_channels, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, num_classes)

    def forward(self, images):
        return self.head(self.norm(self.last(self.main(self.stem(images))).mean(dim=(2, 3))))


class OtherOrder(Plain):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.main = self._modules.pop("main")


class Shifted(Plain):
    def forward(self, images):
        return super().forward(images + 1 + self.stem.bias.mean())


class Branching(Plain):
    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


class OneBitAlready(Plain):
    def __init__(self, *shape, **by_name):
        super().__init__(*shape, **by_name)
        self.last = BinaryConv2d(4, 4, 3, padding=1)


def test_a_packed_file_is_loaded_into_the_network_that_it_is_of(tmp_path):
    model, file = BNN(network=f"{__name__}.Plain"), tmp_path / "network.safetensors"
    save_packed(model.net, file, packed(model).description)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_packed(file, network=Plain)(images), model(images))
    for network, said in {
        None: r"is of a network of .*\.Plain: load_packed\(path, network=...\) takes a function that makes it",
        OtherOrder: "is of another network than the one that is made for it now",
        partial(Plain, 7): "is of another network than the one that is made for it now",
        InPlace: "needs a function without arguments as network, but that failed: .*kind",
        (lambda: 5): "needs a function that makes a network, but that made int",
    }.items():
        with pytest.raises(InputError, match=said):
            load_packed(file, network=network)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_constants_and_parameters_have_no_translation(runtime):
    with pytest.raises(InputError, match="is neither a module nor a sum"):
        RUNTIMES[runtime](packed(BNN(network=f"{__name__}.Shifted")))


def test_what_could_not_be_loaded_is_not_saved():
    with pytest.raises(InputError, match="there is no such network"):
        packed(BNN(network=f"{__name__}.Branching"))
    with pytest.raises(InputError, match="last was a 1-bit layer before the conversion"):
        packed(BNN(network=f"{__name__}.OneBitAlready", convert={"include": "main"}))
