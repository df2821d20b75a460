"""``groups`` and ``bias`` of the 1-bit convolutions, against one ungrouped convolution for each group."""

import inspect
import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import EXACT
from torch import nn
from torch.func import functional_call

from pcnn_lightning.deploy import freeze
from pcnn_lightning.layers import BinaryConv2d, FrozenConv2d, ModulatedConv2d, ProjectionConv2d, SignActivation, Storage

WEIGHT = 0.3  # of the quantization losses, large, so that every term of the gradients matters
PLANES = {ProjectionConv2d: "projections", ModulatedConv2d: "planes"}
LOSS_WEIGHTS = {ProjectionConv2d: "projection_loss_weight", ModulatedConv2d: "filter_loss_weight"}
KINDS = {
    "PCNN": (ProjectionConv2d, {}),
    "PCNN, mean": (ProjectionConv2d, {"projection_forward": "mean"}),
    "PCNN, ternary": (ProjectionConv2d, {"stage": "ternary"}),
    "PCNN, η": (ProjectionConv2d, {"eta": 0.5}),
    "PCNN, ternary, η": (ProjectionConv2d, {"stage": "ternary", "eta": 0.5}),
    "MCN": (ModulatedConv2d, {}),
    "MCN-1": (ModulatedConv2d, {"average": True}),
    "MCN, three levels": (ModulatedConv2d, {"levels": 3}),
    "U-MCN": (ModulatedConv2d, {"binarize": False}),
    "BNN": (BinaryConv2d, {}),
    "BNN, one scale": (BinaryConv2d, {"scaling": "layer"}),
    "BNN, no scale": (BinaryConv2d, {"scaling": "none"}),
}
every_kind = pytest.mark.parametrize("name", KINDS)
every_layer = pytest.mark.parametrize("kind", [ProjectionConv2d, ModulatedConv2d, BinaryConv2d])

# Groups; channels of the input, latent kernels and planes of each group. Depthwise: one channel of the input.
sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
shapes = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.integers(1, 2),
        "padding": st.tuples(st.integers(0, 2), st.integers(0, 1)),
        "dilation": st.integers(1, 2),
    }
)


def make_layer(name, size, shape=None, seed=0, bias=True, dtype=torch.float64):
    """A layer with |W̃ ∘ C| on both sides of 1, M of both signs, and a bias."""
    torch.manual_seed(seed)
    kind, options = KINDS[name]
    groups, inputs, latent, planes = size
    planes = planes if kind in PLANES else 1
    if kind in PLANES:
        options = {**options, PLANES[kind]: planes, LOSS_WEIGHTS[kind]: WEIGHT}
    shape = {"kernel_size": 3, "padding": 1, **(shape or {})}
    layer = kind(groups * inputs, groups * latent * planes, **shape, groups=groups, bias=bias, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    if kind is ModulatedConv2d:
        layer.refresh_centers()
    return layer


def draw_input(layer, batch=2):
    return torch.randn(batch, layer.in_channels, 7, 6, dtype=layer.weight.dtype)


def task_loss(y):
    """Not linear in y, so that δ depends on the kernels and the bias."""
    return (y - 0.3).square().mean() + y.sin().mean()


def convolution_of(layer):
    shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return {**shape, "groups": layer.groups, "bias": None if layer.bias is None else layer.bias.detach()}


def binary_kernels(layer):
    scales = {"channel": lambda kernel: kernel.abs().mean(), "layer": lambda _: layer.weight.abs().mean()}
    scale = scales.get(layer.scaling, lambda _: 1.0)
    return torch.stack([scale(kernel) * reference.sign(kernel) for kernel in layer.weight.detach()])


def reference_of(layer, delta_of):
    """The kernels that convolve, and the gradients of C and W or M, given δ as a function of the kernels."""
    weight = layer.weight.detach()
    if isinstance(layer, BinaryConv2d):
        kernels = binary_kernels(layer)
        return kernels, (delta_of(kernels) * (weight.abs() <= 1),)
    if isinstance(layer, ProjectionConv2d):
        options = {"levels": layer.levels, "projection_forward": layer.projection_forward}
        kernels = reference.quantize(weight, layer.projection, **options)
        given = weight, layer.projection, kernels, delta_of(kernels)
        return kernels, reference.gradients(*given, loss_weight=WEIGHT, eta=layer.eta)
    quantized = reference.quantize_by_levels(weight, centers=layer.centers, binarize=layer.binarize)
    kernels = reference.modulate(quantized, layer.modulation, layer.average)
    given = weight, layer.modulation, quantized, delta_of(kernels)
    return kernels, reference.modulation_gradients(*given, loss_weight=WEIGHT, average=layer.average)


def step(layer, x):
    loss = layer.quantization_loss if layer.loss_name else lambda: 0.0
    (task_loss(layer(x)) + loss()).backward()


# --- forward and gradients ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(list(KINDS)), sizes, shapes, st.integers(0, 10_000), st.booleans())
def test_output_and_gradients_are_the_equations(name, size, shape, seed, bias):
    layer = make_layer(name, size, shape, seed, bias)
    x, convolution = draw_input(layer).requires_grad_(), convolution_of(layer)
    kernels, expected = reference_of(layer, lambda d: reference.task_gradient(task_loss, x, d, **convolution))
    torch.testing.assert_close(layer.quantized_weight(), kernels, **EXACT)
    y = reference.convolve(x, kernels, **convolution)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), y, **EXACT)
    assert torch.equal(freeze(layer)(x), layer(x))

    step(layer.train(), x)
    second = [] if layer.second_parameter is None else [getattr(layer, layer.second_parameter)]
    for parameter, formula in zip([layer.weight, *second], expected, strict=True):
        torch.testing.assert_close(parameter.grad, formula, **EXACT)
    by_x, by_y = torch.autograd.grad(task_loss(y), (x, y))
    torch.testing.assert_close(x.grad, by_x, **EXACT)
    if bias:  # a sum over images and pixels
        torch.testing.assert_close(
            layer.bias.grad, torch.stack([by_y[:, c].sum() for c in range(len(layer.bias))]), **EXACT
        )


@every_kind
@pytest.mark.parametrize("size", [(2, 2, 1, 2), (3, 1, 2, 2), (3, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_input_bias_and_m_are_true_derivatives(name, size, training):
    layer = make_layer(name, size).train(training)
    names = ["bias", "modulation"] if isinstance(layer, ModulatedConv2d) else ["bias"]
    values = [getattr(layer, one).detach().clone().requires_grad_() for one in names]

    def of_input(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(of_input, (draw_input(layer, 1)[..., :3, :4].requires_grad_(), *values))


@pytest.mark.parametrize("stage", ["binary", "ternary"])
@pytest.mark.parametrize("size", [(2, 2, 2, 3), (4, 1, 1, 2)], ids=str)
def test_micro_batches_add_up_to_the_whole_batch(stage, size):
    """The term that is quadratic in η is held back until the step."""
    layer = make_layer("PCNN, η" if stage == "binary" else "PCNN, ternary, η", size)
    x, convolution = draw_input(layer, 4), convolution_of(layer)
    _, expected = reference_of(layer, lambda d: reference.task_gradient(task_loss, x, d, **convolution))
    layer.begin_training(split_updates=True)
    for part in x.chunk(2):
        ((task_loss(layer(part)) + layer.quantization_loss()) / 2).backward()
    layer.before_step()
    for parameter, formula in zip((layer.weight, layer.projection), expected, strict=True):
        torch.testing.assert_close(parameter.grad, formula, **EXACT)


@every_kind
def test_compiled_gradients(name):
    torch._dynamo.reset()
    layer = make_layer(name, (3, 1, 2, 2))
    network, x = nn.Sequential(SignActivation(), layer), draw_input(layer)
    gradients = []
    for forward in (network, torch.compile(network, fullgraph=True, backend="aot_eager")):
        network.zero_grad()
        task_loss(forward(x)).backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)


def test_autocast_convolves_in_half_with_a_bias():
    layer = make_layer("PCNN", (2, 2, 1, 2), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(draw_input(layer))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.bias.grad.dtype == torch.float32


def test_one_image_without_a_batch():
    for name in KINDS:
        layer = make_layer(name, (2, 2, 1, 2))
        x = draw_input(layer)
        for training in (True, False):
            torch.testing.assert_close(layer.train(training)(x[0]), layer(x)[0], **EXACT)


# --- parameters -----------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_shapes_and_initial_values(kind, groups):
    torch.manual_seed(0)
    planes = {PLANES[kind]: 2} if kind in PLANES else {}
    layer = kind(8, 256 * groups, 3, groups=groups, bias=True, **planes)
    assert layer.weight.shape == (256 * groups // layer.planes, 8 // groups, 3, 3)
    assert layer.quantized_weight().shape == (256 * groups, 8 // groups, 3, 3)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (8 // groups * 9)), rel=0.05)
    assert list(dict(layer.named_parameters()))[:2] == list(layer.state_dict())[:2] == ["weight", "bias"]
    assert isinstance(layer.bias, nn.Parameter)
    assert torch.equal(layer.bias, torch.zeros(256 * groups))
    nn.init.ones_(layer.bias)
    layer.reset_parameters()
    assert not layer.bias.any()


@every_layer
def test_arguments_have_the_places_of_an_ordinary_convolution(kind):
    place = list(inspect.signature(nn.Conv2d).parameters).index("bias") + 1
    ordinary, own = (list(inspect.signature(one).parameters)[:place] for one in (nn.Conv2d, kind))
    assert own == ordinary
    planes = {PLANES[kind]: 1} if kind in PLANES else {}
    layer = kind(4, 8, 3, 1, 1, 1, 4, True, **planes)
    assert (layer.groups, tuple(layer.bias.shape)) == (4, (8,))
    for one in (layer, layer.frozen()):
        assert "dilation=(1, 1), groups=4, bias=True, " in repr(one)
        assert one.shape == (4, 8, (3, 3), (1, 1), (1, 1), (1, 1), 4, True)
    for one in (kind(4, 8, 3), kind(4, 8, 3).frozen()):
        assert "groups" not in repr(one)
        assert "bias" not in repr(one)
        assert one.bias is None
        assert "bias" not in one.state_dict()


@every_layer
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, "groups must divide in_channels=4 and out_channels=8, but got 3"),
        ({"out_channels": 6, "groups": 4}, "groups must divide in_channels=4 and out_channels=6, but got 4"),
        ({"groups": 16}, "groups must divide in_channels=4 and out_channels=8, but got 16"),
        ({"groups": 0}, "groups must be an integer of at least 1, but got 0"),
        ({"groups": -2}, "groups must be an integer of at least 1, but got -2"),
        ({"groups": True}, "groups must be an integer of at least 1, but got True"),
        ({"groups": 2.0}, "groups must be an integer of at least 1, but got 2.0"),
        ({"groups": (2, 2)}, r"groups must be an integer of at least 1, but got \(2, 2\)"),
        ({"groups": None}, "groups must be an integer of at least 1, but got None"),
        ({"bias": 1}, "bias must be true or false, but got 1"),
        ({"bias": None}, "bias must be true or false, but got None"),
        ({"bias": torch.zeros(8)}, "bias must be true or false, but got tensor"),
    ],
    ids=str,
)
def test_wrong_groups_and_biases_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        kind(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("kind", PLANES)
def test_planes_divide_the_output_channels_of_a_group(kind):
    name = PLANES[kind]
    with pytest.raises(ValueError, match=f"^{name} must divide out_channels=8 / groups=4, but got 4$"):
        kind(4, 8, 3, groups=4, **{name: 4})
    assert kind(4, 16, 3, groups=4, **{name: 4}).weight.shape == (4, 1, 3, 3)


# --- inference ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("size", [(2, 3, 2, 2), (5, 1, 1, 1)], ids=str)
def test_a_frozen_layer_is_the_layer_in_evaluation_mode(name, size):
    layer = make_layer(name, size, {"stride": 2, "padding": 1}, dtype=torch.float32).eval()
    frozen, plain = freeze(layer), freeze(make_layer(name, size, bias=False))
    assert list(frozen.parameters()) == []
    assert torch.equal(frozen.bias, layer.bias)
    assert frozen.bias.data_ptr() != layer.bias.data_ptr()
    for x in (draw_input(layer), draw_input(layer).sign()):
        assert torch.equal(frozen(x), layer(x))
    *codes, floats = layer.storage()
    assert layer.storage() == frozen.storage()
    assert plain.storage() == Storage(*codes, floats - layer.out_channels)
    assert sum(codes) == (0 if name == "U-MCN" else (frozen.codes if "levels" in name else frozen.signs).numel())
    assert torch.equal(freeze(frozen)(x), frozen(x))


def test_sums_of_signs_are_exact_whatever_the_bias():
    """A scale of 1/3 is rounded once, and the bias added to the product."""
    layer = FrozenConv2d(4, 8, 3, groups=2, bias=True)
    layer.scale.fill_(1 / 3)
    layer.bias.normal_()
    x = torch.randn(2, 4, 6, 6).sign()
    sums = reference.convolve(x.double(), layer.signs.double(), groups=2).float()
    assert torch.equal(layer(x), sums * layer.scale + layer.bias[:, None, None])


def test_a_bias_that_is_not_finite_is_refused():
    layer = BinaryConv2d(2, 4, 3, bias=True)
    nn.init.constant_(layer.bias, math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        freeze(layer)
