"""Conversion of networks: which convolutions become 1-bit, what they keep, and what is refused."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from pcnn_lightning.conversion import convert
from pcnn_lightning.layers import BinaryConv2d, ModulatedConv2d, ProjectionConv2d, QuantizedConv2d, SignActivation

SHAPE = (3, 32, 32)
LAYERS = {"PCNN": ProjectionConv2d, "MCN": partial(ModulatedConv2d, planes=1), "BNN": BinaryConv2d}


class Block(nn.Module):
    """Every kind of convolution, called in another order than they are registered in."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(8, 2)
        self.downsample = nn.Conv2d(4, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1, bias=False)
        self.main = nn.Conv2d(4, 8, 3, padding=2, dilation=2)
        self.unused = nn.Conv2d(4, 8, 3)
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, images):
        x = self.stem(images).relu()
        x = self.main(x) + self.downsample(x)
        x = self.pointwise(self.depthwise(self.grouped(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def converted(network, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return convert(network, image_shape=SHAPE, **options)


def one_bit(network):
    return {name for name, module in network.named_modules() if isinstance(module, QuantizedConv2d)}


def test_by_default_first_pointwise_grouped_and_shortcut_convolutions_stay_real():
    network = Block()
    report = converted(network)
    assert [(layer.name, layer.reason) for layer in report.layers] == [
        ("stem", "the first convolution"),
        ("main", None),
        ("downsample", "1×1 shortcut"),
        ("grouped", "grouped"),
        ("depthwise", "depthwise"),
        ("pointwise", "1×1 (pointwise)"),
        ("classifier", "linear"),
        ("unused", "no image passes through it"),
    ]
    assert one_bit(network) == {"main"}
    for name in ("stem", "main", "downsample", "grouped", "depthwise", "pointwise", "classifier"):
        assert name in report.table()


def test_pointwise_include_and_exclude():
    chosen = [
        ({"pointwise": True}, {"main", "pointwise"}),
        ({"include": ["grouped", "depth*", "re:s.e[m]"]}, {"grouped", "depthwise", "stem"}),
        ({"include": "re:.*", "exclude": ["unused", "re:.*wise"]}, {"stem", "main", "downsample", "grouped"}),
        ({"pointwise": True, "exclude": "main"}, {"pointwise"}),
    ]
    for options, names in chosen:
        network = Block()
        assert {layer.name for layer in converted(network, **options).converted} == names == one_bit(network)


@pytest.mark.parametrize("name", LAYERS)
def test_the_network_computes_what_the_original_computes_with_quantized_kernels(name):
    torch.manual_seed(0)
    network = Block().eval()
    original = copy.deepcopy(network)
    converted(network, layer=LAYERS[name], include=["main", "downsample", "grouped", "depthwise", "pointwise"])
    for path in one_bit(network):
        layer, before = network.get_submodule(path), original.get_submodule(path)
        assert torch.equal(layer.weight, before.weight), path
        assert (layer.bias is None) == (before.bias is None), path
        before.weight.data = layer.quantized_weight()
    images = torch.randn(2, *SHAPE)
    torch.testing.assert_close(network(images), original(images), rtol=1e-4, atol=1e-5)


def test_c_of_several_planes_is_every_jth_kernel():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    weight = network[1].weight.detach().clone()
    converted(network, layer=partial(ProjectionConv2d, projections=4))
    assert torch.equal(network[1].weight, weight[[0, 4]])


def test_nothing_included_leaves_the_network_as_it_is():
    network = models.resnet18(num_classes=5).eval()
    images = torch.randn(1, *SHAPE)
    before, state = network(images), copy.deepcopy(network.state_dict())
    report = converted(network, include=[])
    assert report.converted == []
    assert torch.equal(network(images), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_class_methods_modes_and_hooks_of_the_network_stay():
    network = models.resnet18(num_classes=5)
    network.layer2.eval()
    modes = {name: module.training for name, module in network.named_modules()}
    converted(network)
    assert type(network) is models.ResNet
    after = {name: module.training for name, module in network.named_modules()}
    assert all(after[name] == mode for name, mode in modes.items() if name in after)
    assert not any(module._forward_hooks for module in network.modules())
    assert len(one_bit(network)) == 16


def test_shares_are_those_of_a_flop_counter():
    network = Block()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *SHAPE))
    counts = counter.get_flop_counts()
    report = converted(network, pointwise=True)
    for layer in report.layers:
        assert 2 * layer.macs == sum(counts.get(f"Block.{layer.name}", {}).values()), layer.name
    weights = {layer.name: layer.weights for layer in report.layers}
    assert weights["main"] == 8 * 4 * 9
    assert weights["depthwise"] == 8 * 9
    assert weights["pointwise"] == 64
    assert report.share_of_weights == (8 * 4 * 9 + 64) / sum(weights.values())
    assert report.share_of_convolution_weights == (8 * 4 * 9 + 64) / (sum(weights.values()) - 16)


def test_overrides_are_arguments_of_single_layers():
    network = models.resnet18(num_classes=5)
    overrides = {"layer3.*": {"projections": 2}, "re:layer3\\.1\\..*": {"projections": 4, "sigma": 0.5}}
    converted(network, overrides=overrides)
    layers = ((name, network.get_submodule(name)) for name in one_bit(network))
    chosen = {name: (layer.projections, layer.sigma) for name, layer in layers}
    assert chosen["layer2.0.conv1"] == (1, 0.7)
    assert chosen["layer3.0.conv1"] == (2, 0.7)
    assert chosen["layer3.1.conv2"] == (4, 0.5)


def test_1_bit_activations_have_a_threshold_for_each_input_channel():
    network = models.resnet18(num_classes=5)
    converted(network, activation=SignActivation)
    pair = network.layer2[0].conv1
    assert [type(module) for module in pair] == [SignActivation, ProjectionConv2d]
    assert pair.activation.threshold.shape == (64,)
    images = torch.randn(4, *SHAPE)
    seen = []
    pair.activation.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].detach(), output.detach())))
    network.train()(images)
    (inputs, signs) = seen[0]
    assert inputs.min() >= 0  # what the ReLU leaves: without a threshold, all signs were +1
    torch.testing.assert_close(pair.activation.threshold.detach(), inputs.mean(dim=(0, 2, 3)))
    assert 0.02 < (signs > 0).float().mean() < 0.98


class Aliased(nn.Module):
    """A convolution that is called by its second name."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.block = nn.Sequential(self.conv, nn.ReLU())

    def forward(self, images):
        return self.block(self.stem(images))


def test_a_layer_with_two_names_is_replaced_under_both():
    network = Aliased()
    converted(network)
    assert isinstance(network.conv, ProjectionConv2d)
    assert network.block[0] is network.conv


class Listed(nn.Module):
    """A convolution that is called from an ordinary list."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.order = [self.stem, self.conv]

    def forward(self, images):
        for layer in self.order:
            images = layer(images)
        return images


class Reading(nn.Module):
    """A network that reads the weight of a convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images):
        return self.conv(self.stem(images)) * self.conv.weight.mean()


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images):
        return self.conv(self.stem(input=images))


def test_inputs_may_be_given_by_keyword():
    assert [layer.name for layer in converted(ByKeyword()).converted] == ["conv"]


def test_the_last_stage_of_a_small_image_is_not_taken_for_squeeze_and_excitation():
    """At 32×32, its feature maps have one pixel."""
    shares = []
    for size in (32, 224):
        network = models.mobilenet_v2(num_classes=5)
        report = convert(network, pointwise=True, image_shape=(3, size, size))
        shares.append(report.share_of_weights)
    assert shares[0] == shares[1]
    network = models.efficientnet_b0(num_classes=5)
    report = convert(network, pointwise=True, image_shape=SHAPE)
    squeezes = [layer.reason for layer in report.layers if ".fc1" in layer.name or ".fc2" in layer.name]
    assert set(squeezes) == {"1×1 on pooled features"}


def test_layers_keep_dtype_padding_and_what_is_not_trained():
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, (3, 1), padding=(2, 0)), nn.Conv2d(4, 4, 3, padding="same", dilation=2)]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), *layers).double().requires_grad_(False)
    original = copy.deepcopy(network)
    converted(network)
    for index in (1, 2):
        layer = network[index]
        assert layer.weight.dtype == layer.bias.dtype == torch.float64
        assert not layer.weight.requires_grad
        assert not layer.bias.requires_grad
        original[index].weight.data = layer.quantized_weight()
    images = torch.randn(2, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(network(images), original(images))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images):
        return self.again(self.again(self.first(images)))


class Standardized(nn.Conv2d):
    """As in timm: a convolution that normalizes its weight."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)) / self.weight.std()
        return F.conv2d(x, weight, self.bias)


def tied():
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    return after_a_stem(first, second)


def patched():
    layer = nn.Conv2d(4, 4, 3)
    layer.forward = lambda x: F.conv2d(x, layer.weight.abs())
    return after_a_stem(layer)


def hooked():
    layer = nn.Conv2d(4, 4, 3)
    layer.register_forward_hook(lambda _, __, output: output.abs())
    return after_a_stem(layer)


def after_a_stem(*modules):
    return nn.Sequential(nn.Conv2d(3, 4, 3), *modules, nn.Conv2d(4, 8, 3))


ASKED_FOR = {
    "a transposed convolution": (after_a_stem(nn.ConvTranspose2d(4, 4, 3)), "1", "transposed"),
    "a 1-D convolution": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Conv1d(4, 4, 3)), "2", "Conv1d"),
    "a 3-D convolution": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 2, 1)),
        "2",
        "Conv3d",
    ),
    "a convolution with a forward of its own": (after_a_stem(Standardized(4, 4, 3)), "1", "Standardized"),
    "a parametrized one": (after_a_stem(parametrizations.weight_norm(nn.Conv2d(4, 4, 3))), "1", "parametrization"),
    "another padding mode": (after_a_stem(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), "1", "reflect"),
    "a layer that is used twice": (Twice(), "again", "2 times"),
    "tied weights": (tied(), "1", "it shares its weight with another layer"),
    "a patched one": (patched(), "1", "Conv2d has a forward method of its own"),
    "one with a hook": (hooked(), "1", "parametrization or hook"),
    "one called from a list": (Listed(), "conv", "by a reference that is no submodule"),
}


@pytest.mark.parametrize("name", ASKED_FOR)
def test_what_cannot_be_converted_is_refused_if_asked_for(name):
    network, path, said = ASKED_FOR[name]
    kinds = {key: type(module) for key, module in network.named_modules()}
    with pytest.raises(ValueError, match=f"^{path} cannot become 1-bit: .*{said}"):
        convert(network, image_shape=SHAPE, include=[path])
    assert {key: type(module) for key, module in network.named_modules()} == kinds
    others = [layer.reason for layer in converted(network, include=[]).layers if layer.name == path]
    assert others == ["not included"]


def test_what_cannot_be_converted_is_named_in_the_table():
    network = after_a_stem(Standardized(4, 4, 3), nn.ConvTranspose2d(4, 4, 3))
    reasons = [layer.reason for layer in converted(network).layers]
    assert reasons == ["the first convolution", "Standardized has a forward method of its own", "transposed", None]


@pytest.mark.parametrize(
    ("network", "options", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), {}, "no convolution"),
        (Block(), {"include": ["maim"]}, "include: 'maim' matches no convolution; there are stem, main"),
        (Block(), {"exclude": ["layer9.*"]}, "exclude: 'layer9.*' matches no convolution"),
        (Block(), {"include": "re:("}, "no regular expression"),
        (Block(), {"overrides": {"stem": {"projections": 2}}}, "overrides: 'stem' matches no converted layer; .*main"),
        (Block(), {"overrides": {"main": {"planets": 2}}}, "main: .*planets"),
        (Block(), {"layer": partial(ProjectionConv2d, projections=3)}, "main: projections must divide"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "no convolution became 1-bit: 1 × the first convolution"),
        (Listed(), {}, "conv cannot become 1-bit: the network calls it by a reference"),
        (Reading(), {"activation": SignActivation}, "cannot work with 1-bit layers .*: .*no attribute 'weight'"),
        (nn.Conv2d(3, 4, 3), {"include": "*"}, "put it into an nn.Sequential"),
        (
            models.resnet18(),
            {"include": "layer1"},
            r"'layer1' matches no convolution; there are layer1\.\* for those in it",
        ),
        (Block(), {"layer": nn.Conv2d}, "layer must make 1-bit convolutions, but made a Conv2d"),
        (Block(), {"overrides": {"main": {"stride": 2}}}, "main: stride is taken from the convolution"),
        (Block(), {"pointwise": "nope"}, "pointwise must be true or false, but got 'nope'"),
        (Block(), {"overrides": {"re:(": {}}}, "overrides: .* is no regular expression"),
        (nn.Sequential(nn.Conv2d(5, 4, 3)), {}, r"an image of shape \(3, 32, 32\) cannot pass"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(network, options, said):
    network = copy.deepcopy(network)
    kinds = {key: type(module) for key, module in network.named_modules()}
    with pytest.raises(ValueError, match=said):
        convert(network, **{"image_shape": SHAPE, "layer": BinaryConv2d, **options})
    assert {key: type(module) for key, module in network.named_modules()} == kinds


@pytest.mark.parametrize(
    "options", [{"include": 5}, {"exclude": [5]}, {"overrides": ["a"]}, {"overrides": {"main": 2}}]
)
def test_arguments_of_other_types_are_refused(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be .*, but got"):
        convert(Block(), image_shape=SHAPE, **options)


def test_a_network_that_stays_mostly_real_is_warned_of():
    with pytest.warns(UserWarning, match=r"only 2\d% of the weights of convolutions.*1 × grouped"):
        convert(Block(), image_shape=SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(models.resnet18(num_classes=5), image_shape=SHAPE)
