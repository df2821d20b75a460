"""The contract of ``QuantizedConv2d``, with a layer that implements nothing but ``quantize``."""

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from pcnn_lightning.deploy import freeze
from pcnn_lightning.functional import sign_activation
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, QuantizedConv2d, Storage, one_bit_layers


class Plain(QuantizedConv2d):
    """Signs, times a scale per filter or layer, or alone."""

    def __init__(self, *shape, scaling="channel", **options):
        super().__init__(*shape, **options)
        self.scaling = scaling

    def quantize(self):
        dims = {"channel": (1, 2, 3), "layer": (0, 1, 2, 3), "none": None}[self.scaling]
        scale = 1.0 if dims is None else self.weight.detach().abs().mean(dims, keepdim=True)
        return sign_activation(self.weight) * scale, None


class Real(Plain):
    """Kernels that are not signs."""

    def quantize(self):
        return self.weight * 2, None


scalings = pytest.mark.parametrize("scaling", ["layer", "channel", "none"])


def test_defaults_of_a_plain_binary_layer():
    layer = Plain(2, 4, 3)
    assert layer.second_parameter is None
    assert layer.loss_name is None
    assert layer.quantization_loss() is None
    assert layer.convolves_signs
    assert (layer.stages, layer.stage, layer.levels, layer.planes) == (("real", "binary"), "binary", 2, 1)
    assert layer.pending() == {}
    assert torch.equal(layer.filters(), layer.quantized_weight()[:, 0])
    with pytest.raises(ValueError, match="stage must be one of real, binary, but got 'ternary'"):
        layer.set_stage("ternary")


@scalings
def test_storage_and_frozen_layer(scaling):
    torch.manual_seed(0)
    layer = Plain(3, 4, 3, 2, 1, scaling=scaling)
    scales = {"layer": 1, "channel": 4, "none": 0}[scaling]
    assert layer.storage() == Storage(at_1_bit=4 * 3 * 9, at_2_bits=0, at_32_bits=scales)
    frozen = freeze(layer)
    assert list(frozen.parameters()) == []
    assert torch.equal(frozen.signs, reference.sign(layer.weight).to(torch.int8))
    assert torch.equal(frozen.quantized_weight(), layer.quantized_weight())
    x = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(frozen(x), F.conv2d(x, layer.quantized_weight(), None, 2, 1))
    assert torch.equal(frozen(x), layer.eval()(x))


@pytest.mark.parametrize("kind", [ProjectionConv2d, ModulatedConv2d])
def test_storage_of_other_layers_is_that_of_their_parameters(kind):
    planes = {ProjectionConv2d: {"projections": 4}, ModulatedConv2d: {"planes": 4}}[kind]
    expected = {
        ProjectionConv2d: Storage(at_1_bit=8 * 3 * 9, at_2_bits=0, at_32_bits=1),
        ModulatedConv2d: Storage(at_1_bit=2 * 3 * 9, at_2_bits=0, at_32_bits=4 * 9 + 1),
    }
    assert kind(3, 8, 3, **planes).storage() == expected[kind]


def test_kernels_that_are_not_signs_are_not_frozen_silently():
    with pytest.raises(ValueError, match=r"Real cannot be frozen: its kernels are not signs with scaling 'channel'"):
        freeze(nn.Sequential(Real(2, 4, 3)))


LAYERS = {
    "plain": lambda: Plain(3, 8, 3, scaling="channel"),
    "plain, one scale": lambda: Plain(3, 8, 3, scaling="layer"),
    "plain, no scale": lambda: Plain(3, 8, 3, scaling="none"),
    "projection": lambda: ProjectionConv2d(3, 8, 3, projections=4),
    "projection, ternary": lambda: ProjectionConv2d(3, 8, 3, projections=4, stage="ternary"),
    "projection, η": lambda: ProjectionConv2d(3, 8, 3, projections=4, projection_loss_weight=0.1, eta=0.5),
    "modulated": lambda: ModulatedConv2d(3, 8, 3, planes=4),
    "plain, depthwise": lambda: Plain(3, 6, 3, groups=3, bias=True),
    "projection, depthwise, η": lambda: ProjectionConv2d(
        3, 12, 3, groups=3, bias=True, projections=2, projection_loss_weight=0.1, eta=0.5
    ),
    "modulated, depthwise": lambda: ModulatedConv2d(3, 12, 3, groups=3, bias=True, planes=4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_mode_has_the_gradient_of_training_mode(name):
    """Fine-tuning with batch norms in evaluation mode must not change what a 1-bit layer learns."""
    torch.manual_seed(0)
    layer, x, gradients = LAYERS[name]().double(), torch.randn(2, 3, 6, 5).double(), []
    for mode in (True, False):
        layer.train(mode).zero_grad()
        loss = layer(x).square().mean()
        if layer.loss_name is not None:
            loss = loss + layer.quantization_loss()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_one_bit_layers_are_found_by_their_names():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Plain(3, 4, 1)), ProjectionConv2d(4, 4, 1))
    assert list(one_bit_layers(network)) == ["1.0", "2"]


def test_a_layer_without_quantize_says_so():
    with pytest.raises(NotImplementedError, match="QuantizedConv2d must implement quantize"):
        QuantizedConv2d(2, 4, 3).quantized_weight()


class OwnLevels(Plain):
    """Ternary kernels in a layer whose only stage is binary."""

    levels = 3

    def quantize(self):
        return self.weight.sign() * (self.weight.abs() > 0.1), None


def test_zeros_that_a_packed_file_could_not_hold_are_refused():
    with pytest.raises(ValueError, match="OwnLevels cannot be frozen"):
        freeze(OwnLevels(2, 4, 3))
