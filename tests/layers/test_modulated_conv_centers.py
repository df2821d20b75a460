"""The k-means centers of ``ModulatedConv2d`` with three or four levels."""

import copy
import math

import pytest
import torch
from modulated_layers import draw_batch, make_layer, reference_loss, task_loss
from reference import EXACT

from pcnn_lightning.functional import kmeans_1d
from pcnn_lightning.layers import ModulatedConv2d


@pytest.mark.parametrize("levels", [3, 4])
def test_equal_kernels_are_quantized_without_error(levels):
    layer = ModulatedConv2d(3, 4, 3, levels=levels, planes=1, modulation_init="ones")
    with torch.no_grad():
        layer.weight.fill_(0.1)
    layer.refresh_centers()
    assert torch.equal(layer.quantized_weight(), layer.weight)
    assert layer.quantization_loss() == 0


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_nan_in_the_kernels_propagates_to_the_loss(levels):
    layer = ModulatedConv2d(3, 4, 3, levels=levels)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = math.nan
    assert layer.quantization_loss().isnan()
    layer.refresh_centers()
    assert layer.quantization_loss().isnan()


@pytest.mark.parametrize("kind", ["three", "four"])
def test_centers_change_only_when_refreshed(kind):
    layer, x = make_layer(kind), draw_batch()
    before = layer.centers.clone()
    with torch.no_grad():
        layer.weight *= 3
    for training in (True, False):
        layer.train(training)
        (task_loss(layer(x)) + layer.quantization_loss()).backward()
        layer.quantized_weight()
        assert torch.equal(layer.centers, before)
    layer.refresh_centers()
    torch.testing.assert_close(layer.centers, 3 * before, **EXACT)
    assert not layer.centers.requires_grad


@pytest.mark.parametrize("kind", ["three", "four"])
def test_centers_are_part_of_the_state_dict(kind):
    layer, other = make_layer(kind, dtype=torch.float32), make_layer(kind, seed=1, dtype=torch.float32)
    with torch.no_grad():
        layer.weight += 0.5  # so that its centres are no longer those of its kernels
    other.load_state_dict(layer.state_dict())
    x = draw_batch(dtype=torch.float32)
    assert torch.equal(other.centers, layer.centers)
    assert torch.equal(other(x), layer(x))


def test_refreshing_two_levels_does_nothing():
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    layer.refresh_centers()
    assert layer.centers is None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_refreshed_centers_are_used_by_the_next_loss():
    layer = make_layer("three")
    with torch.no_grad():
        layer.weight += 0.5
    layer(draw_batch())
    stale = reference_loss(layer)
    layer.refresh_centers()
    loss = layer.quantization_loss().item()
    assert loss == pytest.approx(reference_loss(layer), rel=1e-9)
    assert loss != pytest.approx(stale, rel=1e-3)


@pytest.mark.parametrize("levels", [3, 4])
def test_new_and_reset_layers_have_the_centers_of_their_kernels(levels):
    torch.manual_seed(0)
    layer = ModulatedConv2d(3, 8, 3, levels=levels)
    for _ in range(2):
        assert torch.equal(layer.centers, kmeans_1d(layer.weight, levels))
        before = layer.weight.detach().clone()
        layer.reset_parameters()
        assert not torch.equal(layer.weight, before)
