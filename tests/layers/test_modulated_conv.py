"""``ModulatedConv2d``: kernels, initial values and arguments."""

import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modulated_layers import (
    CONVOLUTIONS,
    KINDS,
    assert_gradients,
    draw_batch,
    every_kind,
    make_layer,
    reference_gradients,
    reference_kernels,
    task_loss,
)
from reference import EXACT

from pcnn_lightning.layers import ModulatedConv2d

# --- forward --------------------------------------------------------------------------------------------------------


def explicit_convolution(x, kernels, stride, padding, dilation):
    """F_out^{h,k} = Σ_i F_in^i ∗ Q_{hk}^i (3.16), tap by tap."""
    height, width = kernels.shape[-2:]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    rows = (padded.shape[-2] - dilation[0] * (height - 1) - 1) // stride[0] + 1
    columns = (padded.shape[-1] - dilation[1] * (width - 1) - 1) // stride[1] + 1
    result = torch.zeros(len(x), len(kernels), rows, columns, dtype=torch.float64)
    for channel, i, u, v in itertools.product(*map(range, kernels.shape)):
        top, left = u * dilation[0], v * dilation[1]
        shifted = padded[:, i, top :: stride[0], left :: stride[1]][:, :rows, :columns]
        result[:, channel] += shifted * kernels[channel, i, u, v]
    return result


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31 - 1),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 1)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from(list(KINDS)),
    st.booleans(),
)
def test_output_is_the_sum_over_input_channels(seed, channels, kernel_size, stride, padding, dilation, kind, average):
    originals, in_channels, planes = channels
    torch.manual_seed(seed)
    shape = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    layer = ModulatedConv2d(
        in_channels, originals * planes, **shape, planes=planes, average=average, **KINDS[kind]
    ).double()
    x = torch.randn(2, in_channels, 6, 7, dtype=torch.float64)
    expected = explicit_convolution(x, reference_kernels(layer), stride, padding, dilation)
    torch.testing.assert_close(layer(x), expected, **EXACT)


@every_kind
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, (2, 3), 4], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_forward_is_a_convolution_with_q(kind, planes, average, convolution, kernel_size):
    arguments = {"stride": 1, "padding": 0, "planes": planes, "average": average, **convolution}
    layer = make_layer(kind, kernel_size=kernel_size, **arguments)
    x, expected = draw_batch(), reference_kernels(layer)
    torch.testing.assert_close(layer.quantized_weight(), expected, **EXACT)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected, **convolution), **EXACT)


@pytest.mark.parametrize(("levels", "centers"), [(2, {}), (3, {"centers": (3,)}), (4, {"centers": (4,)})])
def test_parameter_shapes_and_state_dict(levels, centers):
    layer = ModulatedConv2d(3, 8, (2, 3), planes=4, levels=levels)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (2, 3, 2, 3),
        "modulation": (4, 2, 3),
        **centers,
    }
    assert dict(layer.named_parameters()).keys() == {"weight", "modulation"}
    assert layer.quantized_weight().shape == (8, 3, 2, 3)
    assert not layer.quantized_weight().requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_signs_of_m_change_no_output_and_only_the_signs_of_its_gradient(kind, planes, average, dtype):
    layer = make_layer(kind, dtype=dtype, planes=planes, average=average)
    x = draw_batch(dtype=dtype)
    flips = reference.sign(torch.randn(layer.modulation.shape, dtype=dtype, generator=torch.Generator().manual_seed(5)))
    outcomes = []
    for factor in (1, -1, flips):
        layer.zero_grad()
        with torch.no_grad():
            layer.modulation *= factor
        y, kernels = layer(x), layer.quantized_weight()
        loss = layer.quantization_loss()
        (task_loss(y) + loss).backward()
        of_magnitude = layer.modulation.grad * layer.modulation.detach().sign()
        outcomes.append((y, kernels, loss, layer.weight.grad.clone(), of_magnitude))
    for outcome in outcomes[1:]:
        assert all(itertools.starmap(torch.equal, zip(outcome, outcomes[0], strict=True)))


@pytest.mark.parametrize("average", [False, True])
def test_zero_in_m_has_positive_sign(average):
    layer = make_layer(average=average)
    with torch.no_grad():
        layer.modulation[0] = 0.0
        layer.modulation[1, 0] = -0.0
    x = draw_batch()
    expected = reference_gradients(layer, x)
    assert expected[1][0].any()
    (task_loss(layer(x)) + layer.quantization_loss()).backward()
    assert_gradients(layer, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planes_of_mcn_1_are_constant(kind, dtype):
    layer = make_layer(kind, dtype=dtype, average=True)
    kernels = layer.quantized_weight().unflatten(0, (2, 4))
    with torch.no_grad():
        by_hand = layer.modulation.abs().mean(dim=(1, 2))
        layer.modulation.copy_(by_hand.reshape(4, 1, 1).expand(4, 3, 3))
        layer.average = False
    constant = layer.quantized_weight().unflatten(0, (2, 4))
    torch.testing.assert_close(kernels, constant)
    ratios = kernels[:, 1:] / kernels[:, :1]  # of planes: one number each, wherever in the kernel
    torch.testing.assert_close(ratios, (by_hand[1:] / by_hand[0]).reshape(1, 3, 1, 1, 1).expand_as(ratios))


def test_two_levels_hold_two_values_even_where_c_is_zero():
    layer = make_layer(modulation_init="ones", planes=1)
    with torch.no_grad():
        layer.modulation.fill_(1.0)
        layer.weight[0] = 0.0
        layer.weight[1, 0] = -0.0
    scale, kernels = layer.weight.detach().abs().mean().item(), layer.quantized_weight()
    assert kernels.unique().tolist() == pytest.approx([-scale, scale])
    assert (kernels[layer.weight == 0] > 0).all()


def test_constant_scale():
    layer = make_layer("constant")
    with torch.no_grad():
        layer.modulation.fill_(1.0)
        layer.weight *= 100
    assert layer.quantized_weight().unique().tolist() == [-0.4, 0.4]


def test_mean_scale_follows_c_in_every_forward():
    layer, x = make_layer(), draw_batch()
    before = layer(x)
    with torch.no_grad():
        layer.weight *= 2
    torch.testing.assert_close(layer(x), 2 * before, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_levels_give_more_values_and_a_lower_reconstruction_error(dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 32, 3, 3, dtype=dtype)
    errors = {}
    for levels in (2, 3, 4):
        layer = ModulatedConv2d(32, 64, 3, planes=1, levels=levels, modulation_init="ones").to(dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer.refresh_centers()
        kernels = layer.quantized_weight()
        assert len(kernels.unique()) == levels
        errors[levels] = (kernels - weight).square().mean().item()
        assert layer.quantization_loss().item() == pytest.approx(0.5e-4 * errors[levels] * weight.numel(), rel=1e-5)
    # Distortion of the best 2, 3 and 4 levels of a Gaussian of unit variance (Max, 1960).
    assert [errors[levels] for levels in (2, 3, 4)] == pytest.approx([0.3634, 0.1902, 0.1175], rel=0.05)


def test_without_binarization_the_kernels_are_modulated_directly():
    layer = make_layer("unbinarised")
    with torch.no_grad():
        layer.modulation.fill_(-1.0)
    assert torch.equal(layer.quantized_weight(), layer.weight.repeat_interleave(4, dim=0))
    assert layer.quantization_loss() == 0


# --- initial values -------------------------------------------------------------------------------------------------


def many_modulations(modulation_init):
    torch.manual_seed(0)
    layer = ModulatedConv2d(1, 4096, 3, planes=4096, modulation_init=modulation_init)
    return layer.modulation.detach().flatten()  # 36,864 numbers


@pytest.mark.parametrize(("modulation_init", "mean", "deviation"), [("normal", 0.0, 1.0), ("near_one", 1.0, 0.1)])
def test_gaussian_modulations(modulation_init, mean, deviation):
    drawn = (many_modulations(modulation_init) - mean) / deviation
    assert drawn.mean().item() == pytest.approx(0, abs=0.03)
    assert drawn.std().item() == pytest.approx(1, abs=0.03)
    assert (drawn.abs() <= 1).double().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.02)


def test_uniform_modulations():
    drawn = many_modulations("uniform")
    assert drawn.min() >= 0
    assert drawn.max() <= 2
    assert drawn.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx([0.5, 1, 1.5], abs=0.03)


def test_one_modulations():
    assert many_modulations("ones").unique().tolist() == [1]


def test_modulations_are_normal_by_default():
    torch.manual_seed(0)
    drawn = ModulatedConv2d(1, 4096, 3, planes=4096).modulation.detach().flatten()
    assert torch.equal(drawn, many_modulations("normal"))


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"groups": 2}, ["groups", "in_channels=3", "out_channels=8", "2"]),
        ({"out_channels": 6, "planes": 4}, ["planes", "out_channels=6", "4"]),
        ({"planes": 0}, ["planes", "0", "at least 1"]),
        ({"planes": -4}, ["planes", "-4", "at least 1"]),
        ({"planes": 2.0}, ["planes", "2.0", "integer"]),
        ({"in_channels": 0}, ["in_channels", "0", "at least 1"]),
        ({"out_channels": 0}, ["out_channels", "0", "at least 1"]),
        ({"kernel_size": 0}, ["kernel_size", "0", "at least 1"]),
        ({"kernel_size": (3, 0)}, ["kernel_size", "(3, 0)", "at least 1"]),
        ({"kernel_size": (3, 3, 3)}, ["kernel_size", "(3, 3, 3)", "pair"]),
        ({"stride": 0}, ["stride", "0", "at least 1"]),
        ({"dilation": (1, 0)}, ["dilation", "(1, 0)", "at least 1"]),
        ({"padding": -1}, ["padding", "-1", "at least 0"]),
        ({"padding": "full"}, ["padding", "'full'", "valid", "same"]),
        ({"padding": "same", "stride": 2}, ["padding", "'same'", "stride", "2"]),
        ({"levels": 1}, ["levels", "1", "2, 3 or 4"]),
        ({"levels": 5}, ["levels", "5", "2, 3 or 4"]),
        ({"levels": "three"}, ["levels", "'three'", "2, 3 or 4"]),
        ({"modulation_init": "zeros"}, ["modulation_init", "'zeros'", "normal", "uniform", "near_one", "ones"]),
        ({"scale": 0.0}, ["scale", "0.0", "positive"]),
        ({"scale": -0.4}, ["scale", "-0.4", "positive"]),
        ({"scale": math.nan}, ["scale", "nan", "positive"]),
        ({"scale": math.inf}, ["scale", "inf", "positive"]),
        ({"scale": "mean"}, ["scale", "'mean'", "positive"]),
        ({"scale": 0.4, "levels": 3}, ["scale", "levels is 3", "two levels"]),
        ({"filter_loss_weight": -1e-4}, ["filter_loss_weight", "-0.0001", "at least 0"]),
        ({"filter_loss_weight": math.nan}, ["filter_loss_weight", "nan", "at least 0"]),
        ({"filter_loss_weight": math.inf}, ["filter_loss_weight", "inf", "at least 0"]),
        ({"filter_loss_weight": None}, ["filter_loss_weight", "None", "at least 0"]),
    ],
    ids=str,
)
def test_wrong_arguments_raise(arguments, parts):
    correct = {"in_channels": 3, "out_channels": 8, "kernel_size": 3}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked part by part
        ModulatedConv2d(**{**correct, **arguments})
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_an_integer_scale_and_no_filter_loss_are_allowed():
    layer = make_layer(scale=1, filter_loss_weight=0)
    x = draw_batch()
    (task_loss(layer(x)) + layer.quantization_loss()).backward()
    assert layer.quantization_loss() == 0
    assert_gradients(layer, reference_gradients(layer, x, loss_weight=0.0))
