"""Networks of torchvision, of timm and of the user: what is exchanged in them, and what is refused."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from pcnn_lightning.backbones.external import SplitNetwork, external_network, users_network
from pcnn_lightning.errors import InputError


def test_classes_and_channels_are_exchanged_and_the_rest_is_torchvisions():
    torch.manual_seed(0)
    network = external_network("torchvision/resnet18", 7, 1)
    assert isinstance(network, models.ResNet)
    assert (network.fc.out_features, network.conv1.in_channels) == (7, 1)
    assert network(torch.randn(2, 1, 64, 64)).shape == (2, 7)


def test_gray_images_pass_a_pretrained_network_as_gray_images_in_color(tmp_path):
    torch.manual_seed(0)
    pretrained = models.resnet18().eval()
    torch.save(pretrained.state_dict(), tmp_path / "weights.pt")
    save_file(pretrained.state_dict(), tmp_path / "weights.safetensors")
    gray = torch.randn(2, 1, 64, 64)
    for file in ("weights.pt", "weights.safetensors"):
        network = external_network("torchvision/resnet18", 1000, 1, pretrained=str(tmp_path / file)).eval()
        torch.testing.assert_close(network(gray), pretrained(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_small_images_are_not_strided_and_pooled():
    network = external_network("torchvision/resnet18", 10, 3, small_images=True)
    seen = []
    network.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    network(torch.randn(2, 3, 32, 32))
    assert seen == [(2, 64, 32, 32)]


def test_auxiliary_classifiers_are_left_out():
    network = external_network("torchvision/googlenet", 10, 3).train()
    assert isinstance(network(torch.randn(2, 3, 64, 64)), torch.Tensor)


def test_a_split_network_computes_the_logits_of_the_network():
    torch.manual_seed(0)
    network = models.resnet18(num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    logits = network(images)
    split = SplitNetwork(network, (3, 64, 64)).eval()
    assert torch.equal(split(images), logits)
    assert split.features(images).shape == (2, 512)
    assert split.classifier.out_features == 5


def scaled(num_classes, in_channels):
    """A network whose logits are not the output of its last linear layer."""
    layers = [nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)]
    return nn.Sequential(*layers, nn.LogSoftmax(dim=1))


def pair(num_classes, in_channels):
    class Pair(nn.Sequential):
        def forward(self, images):
            return super().forward(images), images

    return Pair(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def in_double(num_classes, in_channels):
    return scaled(num_classes, in_channels).double()


def by_position(count):
    return count


def failing(num_classes, in_channels):
    raise KeyError("width")


def without_linear(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def a_number(num_classes, in_channels):
    return num_classes


def test_networks_that_cannot_be_split_are_refused():
    with pytest.raises(InputError, match="Sequential must be the output of its last linear layer, 3"):
        SplitNetwork(users_network(f"{__name__}.scaled", 5, 3), (3, 16, 16))
    with pytest.raises(InputError, match="Pair must return logits, but returns a tuple"):
        SplitNetwork(users_network(f"{__name__}.pair", 5, 3), (3, 16, 16))
    with pytest.raises(InputError, match="Sequential has no linear layer"):
        SplitNetwork(users_network(f"{__name__}.without_linear", 5, 3), (3, 16, 16))


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("torchvision/resnet19", {}, "torchvision has no resnet19; it has alexnet, convnext_base"),
        ("keras/resnet18", {}, "the library must be one of torchvision, timm, but got keras"),
        ("torchvision/vgg11", {"small_images": True}, "small_images needs a ResNet"),
        ("torchvision/resnet18", {"pretrained": "missing.pt"}, "there is no file missing.pt"),
        ("torchvision/squeezenet1_0", {}, "needs a convolution and a linear layer"),
    ],
)
def test_mistakes_are_named(name, arguments, said):
    with pytest.raises(InputError, match=said):
        external_network(name, 10, 3, **arguments)


def test_damaged_weights_are_refused(tmp_path):
    for content in (b"", b"\x80\x04N.", b"0" * 100):
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"pretrained: .*weights.pt does not fit"):
            external_network("torchvision/resnet18", 10, 3, pretrained=str(tmp_path / "weights.pt"))


def test_weights_that_cannot_be_downloaded_are_asked_for_as_a_file(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(InputError, match=r"cannot be downloaded \(OSError\): .* as pretrained"):
        external_network("torchvision/resnet18", 10, 3, pretrained=True)


def test_a_network_of_ones_own_is_trained_in_single_precision():
    network = users_network(f"{__name__}.in_double", 5, 3)
    assert {value.dtype for value in network.parameters()} == {torch.float32}


def test_networks_of_timm_are_adapted_by_timm(tmp_path):
    """A stem with a padding of its own stays what it is, with the same response to gray images."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    original = timm.create_model("tf_efficientnet_b0").eval()
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    network = external_network("timm/tf_efficientnet_b0", 5, 1, pretrained=str(tmp_path / "weights.pt")).eval()
    assert type(network.conv_stem) is type(original.conv_stem)
    gray = torch.randn(1, 1, 64, 64)
    same = original.conv_stem(gray.expand(1, 3, 64, 64))
    torch.testing.assert_close(network.conv_stem(gray), same, rtol=1e-4, atol=1e-5)
    assert network.classifier.out_features == 5
    with pytest.raises(InputError, match=r"names like it are .*resnet18"):
        external_network("timm/resnt18", 10, 3)
    with pytest.raises(InputError, match="first convolution of timm/nf_resnet26 is a ScaledStdConv2d"):
        external_network("timm/nf_resnet26", 10, 3, small_images=True)


def test_timm_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install '\.\[timm\]'"):
        external_network("timm/resnet18d", 10, 3)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.build", "nowhere.build cannot be imported"),
        (f"{__name__}.nothing", "cannot be imported"),
        ("nets", r"nets cannot be imported \(it names no package\): it must be package.function"),
        (f"{__name__}.by_position", r"by_position\(num_classes=5, in_channels=3\) failed: TypeError: .*argument"),
        (f"{__name__}.failing", "failed: KeyError: 'width'"),
        ("build", "it must be package.function"),
        (f"{__name__}.a_number", "must return a torch.nn.Module, but returned int"),
    ],
)
def test_functions_that_make_no_network_are_refused(path, said):
    with pytest.raises(InputError, match=said):
        users_network(path, 5, 3)
