"""The transforms of ``torch.func`` over functions and layers, against autograd and loops."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap

from pcnn_lightning.functional import binarize, modulate, project, sign_activation, straight_through
from pcnn_lightning.layers import BinaryConv2d, ModulatedConv2d, ProjectionConv2d

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CENTERS = torch.tensor([-0.8, 0.0, 0.8], dtype=torch.float64)
FUNCTIONS = {
    "sign, clip": lambda c, w: sign_activation(c),
    "sign, polynomial": lambda c, w: sign_activation(c, "polynomial"),
    "straight through": lambda c, w: straight_through(c, c.detach() ** 2),
    "binarize": lambda c, w: binarize(c, normalization="standardize"),
    "binarize, identity": lambda c, w: binarize(c, gradient="identity", scaling="layer"),
    "project": lambda c, w: project(c, w, loss_weight=0.3),
    "project, ternary": lambda c, w: project(c, w, levels=3, loss_weight=0.3, projection_forward="mean"),
    "project, ahead": lambda c, w: project(c, w, loss_weight=0.3, eta=0.5),
    "modulate": lambda c, w: modulate(c, w, loss_weight=0.3),
    "modulate, three levels": lambda c, w: modulate(c, w, loss_weight=0.3, centers=CENTERS, average=True),
}
LAYERS = {
    "PCNN": lambda: ProjectionConv2d(3, 4, 3, projections=2, projection_loss_weight=0.3),
    "PCNN, ahead": lambda: ProjectionConv2d(3, 4, 3, projections=2, projection_loss_weight=0.3, eta=0.5),
    "PCNN, ternary": lambda: ProjectionConv2d(3, 4, 3, stage="ternary", projection_loss_weight=0.3),
    "MCN": lambda: ModulatedConv2d(3, 4, 3, planes=2, filter_loss_weight=0.3),
    "MCN, four levels": lambda: ModulatedConv2d(3, 4, 3, levels=4, filter_loss_weight=0.3),
    "BNN": lambda: BinaryConv2d(3, 4, 3),
    "BNN, depthwise": lambda: BinaryConv2d(3, 6, 3, groups=3, bias=True),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_layer = pytest.mark.parametrize("name", LAYERS)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def total(results):
    """A loss that is not linear in the kernels."""
    kernels, loss = results if isinstance(results, tuple) else (results, 0.0)
    weights = torch.linspace(-1, 2, kernels.numel(), dtype=torch.float64).reshape(kernels.shape)
    return (kernels * weights).square().sum() + loss


def by_autograd(name, weight, matrices):
    leaves = weight.clone().requires_grad_(), matrices.clone().requires_grad_()
    gradients = torch.autograd.grad(total(FUNCTIONS[name](*leaves)), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(gradients, leaves, strict=True)]


@every_function
def test_grad_and_vjp_are_those_of_autograd(name):
    torch.manual_seed(0)
    weight, matrices = drawn(2, 3, 2, 2), drawn(2, 2, 2)
    expected = by_autograd(name, weight, matrices)
    function = lambda c, w: total(FUNCTIONS[name](c, w))  # noqa: E731
    torch.testing.assert_close(grad(function, argnums=(0, 1))(weight, matrices), tuple(expected), **CLOSE)
    _, pull = vjp(function, weight, matrices)
    torch.testing.assert_close(pull(torch.tensor(2.0).double()), tuple(2 * one for one in expected), **CLOSE)


@every_function
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 1)])
def test_vmap_is_a_loop(name, in_dims):
    torch.manual_seed(0)
    shapes, batched = ((2, 3, 2, 2), (2, 2, 2)), []
    for shape, dim in zip(shapes, in_dims, strict=True):
        batched.append(drawn(*shape) if dim is None else drawn(4, *shape).movedim(0, dim))

    def one(i):
        return [one if dim is None else one.select(dim, i) for one, dim in zip(batched, in_dims, strict=True)]

    values = vmap(FUNCTIONS[name], in_dims)(*batched)
    for i, of_one in enumerate(zip(*values, strict=True) if isinstance(values, tuple) else values):
        torch.testing.assert_close(of_one, FUNCTIONS[name](*one(i)), **CLOSE)
    gradients = vmap(grad(lambda c, w: total(FUNCTIONS[name](c, w)), argnums=(0, 1)), in_dims)(*batched)
    for i, of_one in enumerate(zip(*gradients, strict=True)):
        torch.testing.assert_close(list(of_one), by_autograd(name, *one(i)), **CLOSE)


# --- layers ---------------------------------------------------------------------------------------------------------


class WithLoss(torch.nn.Module):
    """A layer and, as its second result, its quantization loss."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        loss = self.layer.quantization_loss()
        return y.square().mean() + (0.0 if loss is None else loss)


def make(name):
    torch.manual_seed(0)
    return WithLoss(LAYERS[name]().double())


def gradients_of(module, x):
    module.zero_grad()
    module(x).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@every_layer
def test_gradients_of_a_functional_call_are_those_of_backward(name):
    module, x = make(name), drawn(2, 3, 5, 5)
    gradients = grad(lambda own: functional_call(module, own, (x,)))(dict(module.named_parameters()))
    torch.testing.assert_close(gradients, gradients_of(module, x), **CLOSE)


@every_layer
def test_gradients_of_single_samples(name):
    module, x = make(name), drawn(4, 3, 5, 5)
    own = dict(module.named_parameters())
    each = vmap(grad(lambda own, x: functional_call(module, own, (x,))), (None, 0))(own, x)
    for i in range(4):
        torch.testing.assert_close({key: value[i] for key, value in each.items()}, gradients_of(module, x[i]), **CLOSE)


@every_layer
def test_an_ensemble_is_its_members(name):
    torch.manual_seed(0)
    members, x = [LAYERS[name]().double() for _ in range(3)], drawn(2, 3, 5, 5)
    skeleton = copy.deepcopy(members[0])
    results = vmap(lambda *state: functional_call(skeleton, state, (x,)))(*stack_module_state(members))
    torch.testing.assert_close(results, torch.stack([member(x) for member in members]), **CLOSE)


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("BNN")])
def test_a_transform_leaves_no_loss_behind(name):
    """What it computed is of other parameters, or of a transform that is over."""
    layer, x = make(name).layer, drawn(2, 3, 5, 5)
    own = dict(layer.named_parameters())
    second = {str(layer.second_parameter): torch.zeros(getattr(layer, str(layer.second_parameter)).shape).double()}
    expected, doubled = layer.quantization_loss(), {key: 2 * value.detach() for key, value in own.items()}
    transforms = {
        "grad": lambda: grad(lambda own: functional_call(layer, own, (x,)).sum())(own),
        "jacrev by the input": lambda: jacrev(layer)(x),
        "vmap over samples": lambda: vmap(layer)(x),
        "vmap over parameters": lambda: vmap(lambda own: functional_call(layer, own, (x,)))(
            {key: torch.stack([value, -value]) for key, value in own.items()}
        ),
        "other parameters": lambda: functional_call(layer, doubled, (x,)),
        "another second parameter": lambda: functional_call(layer, second, (x,)),
    }
    for kind, transform in transforms.items():
        transform()
        loss = layer.quantization_loss()
        assert torch.equal(loss, expected), kind
        layer.zero_grad()
        loss.backward()
        assert all(value.grad is not None and value.grad.any() for value in own.values()), kind
