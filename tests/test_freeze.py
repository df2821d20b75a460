"""Freezing: the trained network's logits and signs, nothing of its training, and each layer against an equation."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from tiny import tiny_mcn, tiny_pcnn
from torch import nn

from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.deploy import (
    FrozenBatchNorm2d,
    FrozenConv2d,
    FrozenModulatedConv2d,
    FrozenProjectionConv2d,
    freeze,
)
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, QuantizedConv2d, SignActivation
from pcnn_lightning.summary import summarize

IMAGE_SHAPE = (3, 33, 30)
STAGES = {name: [4, 6, 8] if name == "vgg_small" else [4, 4, 6, 8] for name in BACKBONES}
STAGES |= {name: [4, 4, 6, 8, 8] for name in BACKBONES if name.startswith("resnet")}

MODELS = {f"PCNN {name}": (tiny_pcnn, {"backbone": name}) for name in BACKBONES}
MODELS |= {f"MCN {name}": (tiny_mcn, {"backbone": name}) for name in BACKBONES}
MODELS |= {
    "PCNN J=1": (tiny_pcnn, {"projections": 1}),
    "PCNN J=4": (tiny_pcnn, {"projections": 4}),
    "PCNN mean": (tiny_pcnn, {"projection_forward": "mean"}),
    "PCNN ternary": (tiny_pcnn, {"stage": "ternary"}),
    "PCNN ternary J=1": (tiny_pcnn, {"stage": "ternary", "projections": 1}),
    "PCNN polynomial": (tiny_pcnn, {"activation_gradient": "polynomial"}),
    "PCNN full precision": (tiny_pcnn, {"full_precision": True}),
    "PCNN full precision mcn8": (tiny_pcnn, {"full_precision": True, "backbone": "mcn8"}),
    "MCN K=1": (tiny_mcn, {"planes": 1}),
    "MCN K=4": (tiny_mcn, {"planes": 4}),
    "MCN-1": (tiny_mcn, {"average": True}),
    "MCN scale": (tiny_mcn, {"scale": 0.1}),
    "MCN U=3": (tiny_mcn, {"levels": 3}),
    "MCN U=4": (tiny_mcn, {"levels": 4}),
    "MCN-1 U=3": (tiny_mcn, {"levels": 3, "average": True}),
    "U-MCN": (tiny_mcn, {"binarize": False}),
    "U-MCN-1": (tiny_mcn, {"binarize": False, "average": True}),
    "MCN dropout": (tiny_mcn, {"dropout": 0.5}),
}


def trained_model(name, seed=0):
    """A model as if trained: no factor of a batch norm is 1, no shift 0, a third of the factors below 0."""
    make, arguments = MODELS[name]
    torch.manual_seed(seed)
    arguments = {"in_channels": 3, **arguments}
    backbone = arguments.get("backbone", "wrn7" if make is tiny_pcnn else "mcn8")
    model = make(stages=STAGES[backbone], center_loss_weight=0.1, **arguments).eval()
    for module in model.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_(0.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2)
        elif isinstance(module, nn.PReLU):
            module.weight.data.normal_()
    return model


def trained(name, seed=0):
    return trained_model(name, seed).net


@torch.no_grad()
def logits_and_signs(network, images):
    signs, hooks = [], []
    for module in network.modules():
        if isinstance(module, SignActivation):
            hooks.append(module.register_forward_hook(lambda _, __, output: signs.append(output)))
    logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, signs


# --- networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_no_sign_flips_and_the_same_logits(name, dtype):
    network = trained(name).to(dtype)
    factors = torch.cat([module.weight for module in network.modules() if isinstance(module, nn.BatchNorm2d)])
    assert (factors < 0).float().mean() > 0.1
    images = torch.randn(4, *IMAGE_SHAPE, dtype=dtype)
    logits, signs = logits_and_signs(network, images)
    frozen_logits, frozen_signs = logits_and_signs(freeze(network), images)
    binarises = name.startswith("PCNN") and "full" not in name
    assert (sum(map(torch.Tensor.numel, signs)) > 1000) == binarises
    assert sum(int((one != other).sum()) for one, other in zip(signs, frozen_signs, strict=True)) == 0
    assert frozen_logits.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(frozen_logits, logits, rtol=0, atol=tolerance * float(logits.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_training_is_left(name):
    network = trained(name)
    frozen = freeze(network)
    gone = (QuantizedConv2d, nn.BatchNorm2d, nn.Dropout)
    assert not any(isinstance(module, gone) for module in frozen.modules())
    one_bit = [module for module in frozen.modules() if isinstance(module, FrozenConv2d)]
    assert len(one_bit) == sum(isinstance(module, QuantizedConv2d) for module in network.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(list(module.parameters()) for module in frozen.modules() if hasattr(module, "symbols"))
    # What is stored is what the summary counts, number by number.
    total = summarize(network, IMAGE_SHAPE).total
    stored = frozen.state_dict().values()
    codes = sum(tensor.numel() for tensor in stored if tensor.dtype == torch.int8)
    floats = sum(tensor.numel() for tensor in stored if tensor.dtype == torch.float32)
    assert (codes, floats) == (total.parameters_1bit + total.parameters_2bit, total.parameters_32bit)
    assert all(tensor.dtype in (torch.int8, torch.float32) for tensor in stored)


@pytest.mark.parametrize("name", ["PCNN resnet18", "MCN mcn_small"])
def test_modules_have_the_names_and_places_of_the_trained_ones(name):
    network = trained(name)
    frozen = freeze(network)
    assert [name for name, _ in frozen.named_modules()] == [name for name, _ in network.named_modules()]
    for before, after in zip(network.modules(), frozen.modules(), strict=True):
        if isinstance(after, FrozenConv2d):
            for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
                assert getattr(after, attribute) == getattr(before, attribute)


@pytest.mark.parametrize("name", ["PCNN ternary", "MCN U=3", "MCN dropout"])
def test_the_trained_network_stays_as_it_is(name):
    network = trained(name).train()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    frozen = freeze(network)
    for tensor in frozen.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_mode_makes_no_difference():
    images = torch.randn(2, *IMAGE_SHAPE)
    for name in ("MCN dropout", "PCNN J=4"):
        frozen = freeze(trained(name))
        assert torch.equal(frozen(images), frozen.train()(images))


def test_in_the_middle_of_training():
    """The loss of a forward pass, which hangs on a graph, is no part of the copy."""
    network = trained("PCNN J=4").train()
    network(torch.randn(2, *IMAGE_SHAPE)).sum().backward()
    frozen = freeze(network)
    images = torch.randn(2, *IMAGE_SHAPE)
    torch.testing.assert_close(frozen(images), network.eval()(images))
    assert not frozen(images).requires_grad


@pytest.mark.parametrize("name", ["PCNN ternary", "MCN U=4"])
def test_frozen_again_is_an_equal_copy(name):
    once = freeze(trained(name))
    twice = freeze(once)
    assert str(once) == str(twice)
    states = once.state_dict(), twice.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert all(tensor.data_ptr() != states[1][key].data_ptr() for key, tensor in states[0].items())


def test_layers_anywhere_in_any_module():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([ProjectionConv2d(3, 4, 3), nn.ModuleDict({"inner": ModulatedConv2d(4, 4, 1)})])
            self.nothing = None
            self.register_module("no_module", None)

        def forward(self, x):
            return self.layers[1]["inner"](self.layers[0](x))

    network, x = Own(), torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(freeze(network)(x), network(x))
    assert isinstance(freeze(network.layers[0]), FrozenProjectionConv2d)


# --- layers -----------------------------------------------------------------------------------------------------

SHAPES = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "dilation": 2},
    {"kernel_size": 3, "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 2, "padding": "valid"},
    {"kernel_size": 1},
]


def with_zeros(layer):
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.2] = 0.0
    return layer


@pytest.mark.parametrize("levels", ["binary", "ternary"])
@pytest.mark.parametrize("projections", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_signs_and_scale_of_a_projection_layer(shape, projections, levels):
    torch.manual_seed(0)
    layer = with_zeros(ProjectionConv2d(5, 6, **shape, projections=projections, levels=levels))
    frozen = freeze(layer)
    expected = reference.quantize(
        layer.weight, layer.projection, levels=levels, projection_forward=layer.projection_forward
    )
    scale = layer.weight.abs().mean() * (1 if levels == "binary" else 0.7)
    torch.testing.assert_close(frozen.scale, scale)
    assert frozen.scale.shape == ()
    assert torch.equal(frozen.signs.double(), (expected / scale.double()).round())
    assert frozen.signs.dtype == torch.int8
    assert frozen.signs.unique().tolist() == list(frozen.symbols) == ([-1, 1] if levels == "binary" else [-1, 0, 1])
    assert torch.equal(frozen.quantized_weight(), layer.quantized_weight())
    x = torch.randn(2, 5, 7, 8)
    assert torch.equal(frozen(x), layer.eval()(x))
    torch.testing.assert_close(frozen(x), layer.train()(x))


@pytest.mark.parametrize("levels", ["binary", "ternary"])
def test_kernels_of_zeros(levels):
    layer = ProjectionConv2d(2, 4, 3, levels=levels)
    nn.init.zeros_(layer.weight)
    frozen = freeze(layer)
    assert frozen.scale == 0
    assert set(frozen.signs.unique().tolist()) <= set(frozen.symbols)
    assert torch.equal(frozen(torch.ones(1, 2, 3, 3)), torch.zeros(1, 4, 1, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"average": True},
        {"scale": 0.3},
        {"levels": 3},
        {"levels": 4, "average": True},
        {"binarize": False},
        {"binarize": False, "average": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_signs_and_planes_of_a_modulated_layer(shape, options):
    torch.manual_seed(0)
    layer = with_zeros(ModulatedConv2d(5, 6, **shape, planes=2, **options))
    assert (layer.modulation < 0).any()
    frozen = freeze(layer)
    average, binarize, levels = options.get("average", False), options.get("binarize", True), options.get("levels", 2)
    quantized = reference.quantize_by_levels(
        layer.weight, scale=options.get("scale"), centers=layer.centers, binarize=binarize
    )
    torch.testing.assert_close(frozen.quantized_kernels(), quantized.float())
    planes = reference.modulating_planes(layer.modulation, average)
    torch.testing.assert_close(frozen.modulation.expand(2, *layer.kernel_size), torch.stack(planes).float())
    assert frozen.modulation.shape == ((2, 1, 1) if average else layer.modulation.shape)
    held = {name for name, buffer in frozen.named_buffers() if buffer is not None}
    if not binarize:
        assert held == {"kernels", "modulation"}
    elif levels == 2:
        assert held == {"signs", "scale", "modulation"}
        assert frozen.signs.unique().tolist() == list(frozen.symbols) == [-1, 1]
    else:
        assert held == {"codes", "values", "modulation"}
        assert frozen.codes.unique().tolist() == list(frozen.symbols) == list(range(levels))
        assert torch.equal(frozen.values, layer.centers)
    assert torch.equal(frozen.quantized_weight(), layer.quantized_weight())
    x = torch.randn(2, 5, 9, 8)
    assert torch.equal(frozen(x), layer(x))


def test_centres_that_coincide():
    layer = ModulatedConv2d(2, 4, 3, levels=4)
    layer.weight.data = layer.weight.sign()  # two values for four centres
    layer.refresh_centers()
    frozen = freeze(layer)
    assert torch.equal(frozen.quantized_weight(), layer.quantized_weight())
    assert frozen.codes.max() < 4


def test_a_batch_norm_is_a_scale_and_a_shift():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(40).eval()
    for values in (norm.weight.data, norm.bias.data, norm.running_mean):
        values.normal_()
    norm.running_var.uniform_(0, 3)
    norm.weight.data[0], norm.running_var[1] = 0, 0
    frozen = freeze(norm)
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    torch.testing.assert_close(frozen.scale.double(), norm.weight.double() / deviation, rtol=1e-6, atol=0)
    x = torch.randn(3, 40, 7, 5)
    centred = (x.double() - norm.running_mean[:, None, None]) / deviation[:, None, None]
    expected = centred * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    torch.testing.assert_close(frozen(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frozen(x), norm(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(frozen(x)[:, 0], norm.bias[0].expand(3, 7, 5))


def test_a_batch_norm_without_factors():
    norm = nn.BatchNorm2d(3, affine=False).eval()
    norm.running_mean.normal_()
    x = torch.randn(2, 3, 4, 4)
    frozen = freeze(norm)
    assert isinstance(frozen, FrozenBatchNorm2d)
    torch.testing.assert_close(frozen(x), norm(x))


def test_a_batch_norm_without_statistics_is_refused():
    with pytest.raises(ValueError, match="track_running_stats"):
        freeze(nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize(
    "layer",
    [
        ProjectionConv2d(2, 2, 3),
        ProjectionConv2d(2, 2, 3, levels="ternary"),
        ModulatedConv2d(2, 4, 3),
        ModulatedConv2d(2, 4, 3, scale=0.1),
        ModulatedConv2d(2, 4, 3, levels=3),
        ModulatedConv2d(2, 4, 3, binarize=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("parameter", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(layer, parameter, value):
    """A sign would hide it, wherever it is."""
    broken = copy.deepcopy(layer)
    list(broken.parameters())[parameter].data.view(-1)[3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        freeze(broken)


def test_arguments_of_frozen_layers():
    with pytest.raises(ValueError, match="levels must be 2, 3, 4 or None, but got 5"):
        FrozenModulatedConv2d(2, 4, 3, levels=5)
    with pytest.raises(ValueError, match="levels must be one of binary, ternary"):
        FrozenProjectionConv2d(2, 4, 3, levels="quaternary")
    layer = FrozenProjectionConv2d(2, 4, (3, 5), stride=2, padding=1)
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 5), (2, 2), (1, 1), (1, 1))
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(layer(x), F.conv2d(x, torch.ones(4, 2, 3, 5), None, 2, 1))
