"""``BinaryConv2d``."""

import pytest
import reference
import torch
import torch.nn.functional as F

from pcnn_lightning.deploy import freeze
from pcnn_lightning.layers import BinaryConv2d, ProjectionConv2d, Storage


@pytest.mark.parametrize(
    ("scaling", "scale"),
    [
        ("layer", lambda weight: weight.abs().mean()),
        ("channel", lambda weight: torch.stack([kernel.abs().mean() for kernel in weight]).reshape(-1, 1, 1, 1)),
        ("none", lambda weight: torch.ones(())),
    ],
)
@pytest.mark.parametrize("convolution", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}], ids=str)
def test_forward_is_a_convolution_with_scaled_signs(scaling, scale, convolution):
    torch.manual_seed(0)
    layer = BinaryConv2d(3, 8, 3, scaling=scaling, **convolution).double()
    weight = layer.weight.detach()
    expected = scale(weight) * reference.sign(weight)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer.quantized_weight(), expected)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected, **convolution))
    torch.testing.assert_close(layer.eval()(x), F.conv2d(x, expected, **convolution))
    assert torch.equal(freeze(layer)(x), layer(x))
    scales = {"layer": 1, "channel": 8, "none": 0}[scaling]
    assert layer.storage() == Storage(at_1_bit=8 * 3 * 9, at_2_bits=0, at_32_bits=scales)


def test_one_scale_per_layer_is_a_projection_layer_with_w_of_one():
    """J = 1 and W = 1 make PCNN's layer a plain binary one (property 3 of the method)."""
    torch.manual_seed(0)
    plain = BinaryConv2d(3, 8, 3, scaling="layer")
    projection = ProjectionConv2d(3, 8, 3, projection_init="ones", projection_loss_weight=0.0)
    projection.weight.data.copy_(plain.weight)
    x, gradients = torch.randn(2, 3, 7, 7), []
    for layer in (plain, projection):
        layer(x).square().sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(plain.quantized_weight(), projection.quantized_weight())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        ({"scaling": "filter"}, ["scaling", "'filter'", "layer, channel, none"]),
        ({"gradient": "polynomial"}, ["gradient", "'polynomial'", "clip, identity"]),
        ({"normalization": "batch"}, ["normalization", "'batch'", "none, center, standardize"]),
        ({"groups": 3}, ["groups", "in_channels=4", "out_channels=4", "3"]),
        ({"out_channels": 0}, ["out_channels", "0"]),
    ],
)
def test_wrong_arguments_raise(arguments, mentioned):
    with pytest.raises(ValueError, match="must ") as error:
        BinaryConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments})
    assert all(word in str(error.value) for word in mentioned)
