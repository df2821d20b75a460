"""Layers with unquantized kernels, as in the first stage of a plan."""

import pytest
import torch
import torch.nn.functional as F

from pcnn_lightning import BinaryConv2d, ModulatedConv2d, ProjectionConv2d, SignActivation
from pcnn_lightning.layers import Storage

x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def expected_kernels(layer):
    """W̃_j ∘ C, C ∘ |M_k| or C, one output channel after the other."""
    kernels = []
    for kernel in layer.weight:
        if getattr(layer, "normalization", "none") == "standardize":
            kernel = (kernel - kernel.mean()) / kernel.std(correction=0) * (2 / kernel.numel()) ** 0.5
        for plane in range(layer.planes):
            if isinstance(layer, ProjectionConv2d):
                matrix = layer.projection[plane]
                factor = matrix.mean() if layer.projection_forward == "mean" else matrix
            else:
                factor = layer.modulation[plane].abs() if isinstance(layer, ModulatedConv2d) else 1
            kernels.append(kernel * factor)
    return torch.stack(kernels)


LAYERS = {
    "PCNN": lambda: ProjectionConv2d(4, 8, 3, padding=1, projections=2),
    "PCNN, mean": lambda: ProjectionConv2d(4, 8, 3, padding=1, bias=True),
    "PCNN, eta": lambda: ProjectionConv2d(4, 8, 3, padding=1, projections=2, eta=0.5),
    "MCN": lambda: ModulatedConv2d(4, 8, 3, padding=1, planes=2, filter_loss_weight=0.0),
    "PCNN, standardized": lambda: ProjectionConv2d(4, 8, 3, padding=1, projections=2, normalization="standardize"),
    "BNN, standardized": lambda: BinaryConv2d(4, 8, 3, padding=1, normalization="standardize"),
    "BNN": lambda: BinaryConv2d(4, 8, 3, padding=1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_real_layer_is_an_ordinary_convolution(name, training):
    torch.manual_seed(0)
    layer = LAYERS[name]().double().train(training)
    layer.set_stage("real")
    loss = layer(x).square().sum()
    if (of_kernels := layer.quantization_loss()) is not None:
        assert (of_kernels.item(), of_kernels.dtype) == (0, torch.float64)
        loss = loss + of_kernels
    found = torch.autograd.grad(loss, list(layer.parameters()))
    expected = F.conv2d(x, expected_kernels(layer), layer.bias, padding=1).square().sum()
    wanted = torch.autograd.grad(expected, list(layer.parameters()))
    torch.testing.assert_close(loss, expected)
    for (parameter, _), one, other in zip(layer.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=parameter: f"{name}: {text}")


@pytest.mark.parametrize("name", LAYERS)
def test_a_real_layer_can_be_binary_again(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    before = layer(x)
    layer.set_stage("real")
    assert not torch.equal(layer(x), before)
    layer.set_stage("binary")
    assert torch.equal(layer(x), before)


def test_a_real_layer_stores_floats_and_is_not_frozen():
    layer = BinaryConv2d(4, 8, 3)
    layer.set_stage("real")
    assert layer.storage() == Storage(at_32_bits=8 * 4 * 9)
    with pytest.raises(ValueError, match="BinaryConv2d has no 1-bit kernels in stage real: train on to binary"):
        layer.frozen()
    kernels = layer.quantized_weight()
    kernels.zero_()
    assert layer.weight.any()


@pytest.mark.parametrize("threshold", [None, 4])
def test_a_sign_that_is_not_enabled_passes_its_input_on(threshold):
    activation = SignActivation(threshold=threshold)
    activation.enabled = False
    inputs = x.clone().requires_grad_()
    y = activation(inputs)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert torch.equal(inputs.grad, 2 * x)
    if threshold is not None:
        assert not activation.is_set
        assert torch.equal(activation.threshold.grad, torch.zeros(4))  # and not None, for which DDP would wait
    activation.enabled = True
    assert set(activation(x).detach().unique().tolist()) == {-1, 1}
