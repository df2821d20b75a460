"""The fast runtime: blocks against equations in float64, thresholds, and whole networks bit for bit against torch."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_files import describe
from tiny import tiny_digits, tiny_pcnn
from torch import nn
from trained_networks import IMAGE_SHAPE, MODELS, trained

from pcnn_lightning.backbones import OneBitBlock
from pcnn_lightning.backbones.blocks import shortcut
from pcnn_lightning.deploy import PackedNetwork, accelerate, freeze, runtime
from pcnn_lightning.deploy.binary_blocks import BinaryBlocks, _thresholds
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import FrozenBatchNorm2d, FrozenConv2d, ProjectionConv2d, SignActivation

numba = pytest.importorskip("numba")

SMALL = st.integers(1, 9)


def randomise(network, seed=0):
    """Give batch norms and PReLUs factors, shifts and slopes of either sign."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.normal_(generator=generator)
            module.running_var.uniform_(0.2, 2, generator=generator)
        elif isinstance(module, nn.PReLU):
            module.weight.data.normal_(generator=generator)
    return network.eval()


def make_block(in_channels, out_channels, stride=1, padding=1, **arguments):
    def convolution(in_channels, out_channels, kernel_size, stride, _):
        return ProjectionConv2d(in_channels, out_channels, kernel_size, stride, padding)

    return randomise(OneBitBlock(in_channels, out_channels, convolution, SignActivation, stride=stride, **arguments))


def in_float64(block, x):
    """BN → sign → convolution → PReLU of a frozen block without shortcut, tap by tap."""
    x, signs = x.double().numpy(), block.conv.signs.double().numpy()
    scale, shift = (values.double().numpy()[:, None, None] for values in (block.norm.scale, block.norm.shift))
    (stride, _), (padding, _) = block.conv.stride, block.conv.padding
    activations = np.pad(np.where(x * scale + shift >= 0, 1.0, -1.0), [(0, 0)] * 2 + [(padding, padding)] * 2)
    height, width = ((side + 2 * padding - 3) // stride + 1 for side in x.shape[2:])
    sums = np.zeros((len(x), len(signs), height, width))
    for row in range(3):
        for column in range(3):
            taken = activations[:, :, row::stride, column::stride][:, :, :height, :width]
            sums += np.einsum("oc,bchw->bohw", signs[:, :, row, column], taken)
    value = sums * float(block.conv.scale)
    slope = block.prelu.weight.double().detach().numpy()[:, None, None]
    return torch.from_numpy(np.where(value > 0, value, value * slope))


def same(fast, frozen, *images):
    return all(torch.equal(fast(x), frozen(x)) for x in images)


# --- blocks -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 130),
    st.integers(1, 40),
    SMALL,
    SMALL,
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 3),
    SMALL,
)
def test_a_block_is_its_equation(in_channels, out_channels, height, width, stride, padding, batch, seed):
    torch.manual_seed(seed)
    height, width = (max(side, 3 - 2 * padding) for side in (height, width))
    block = freeze(make_block(in_channels, out_channels, stride, padding))
    x = torch.randn(batch, in_channels, height, width)
    fast = BinaryBlocks([block])(x)
    torch.testing.assert_close(fast.double(), in_float64(block, x), rtol=1e-6, atol=1e-6)
    assert torch.equal(fast, block(x))


@pytest.mark.parametrize("channels", [1, 16, 20, 63, 64, 65, 130])
def test_blocks_that_add_their_input(channels):
    blocks = nn.Sequential(*(make_block(channels, channels, shortcut=nn.Identity()) for _ in range(4)))
    frozen = freeze(blocks)
    fast = accelerate(frozen)
    assert len(fast) == 1
    assert fast[0].extra_repr() == f"{channels}, {channels}, blocks=4, stride=1"
    images = (torch.randn(2, channels, *size) for size in ((1, 1), (4, 4), (5, 7), (17, 2)))
    assert same(fast, frozen, *images)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_shortcuts_of_full_precision(stride, groups):
    block = make_block(6, 20, stride, shortcut=shortcut(6, 20, stride, groups))
    frozen = freeze(nn.Sequential(block))
    fast = accelerate(frozen)
    assert isinstance(fast[0].shortcut, nn.Conv2d)
    assert same(fast, frozen, *(torch.randn(2, 6, *size) for size in ((1, 1), (6, 9), (8, 8), (7, 10), (3, 40))))


@pytest.mark.parametrize(
    "module",
    [
        nn.AvgPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.AvgPool2d(3, 2, 1)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.PReLU(4), nn.AvgPool2d(2, ceil_mode=True)),
    ],
    ids=["average", "maximum", "overlapping", "rectified"],
)
def test_shortcuts_of_other_kinds_are_left_to_torch(module):
    frozen = freeze(nn.Sequential(make_block(4, 4, 2, shortcut=randomise(copy.deepcopy(module)))))
    fast = accelerate(frozen)
    assert str(fast[0].shortcut) == str(frozen[0].shortcut)
    assert same(fast, frozen, torch.randn(2, 4, 6, 8), torch.randn(1, 4, 7, 9))


def test_unsupported_modules_are_left_in_place():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.alone = make_block(4, 4, shortcut=nn.Identity())
            self.nothing = None
            ternary = make_block(4, 4, shortcut=nn.Identity())
            ternary.conv.set_stage("ternary")
            others = [make_block(4, 4, shortcut=nn.Identity()) for _ in range(4)]
            pooled = make_block(4, 6, pool=nn.MaxPool2d(2, ceil_mode=True))
            self.row = nn.Sequential(*others[:2], ternary, nn.ReLU(), *others[2:], pooled, make_block(6, 6))

        def forward(self, x):
            return self.row(self.alone(x))

    frozen = freeze(Own())
    fast = accelerate(frozen)
    kinds = [type(module).__name__ for module in (fast.alone, *fast.row)]
    assert kinds == ["BinaryBlocks", "BinaryBlocks", "OneBitBlock", "ReLU", *["BinaryBlocks"] * 3]
    assert list(fast.row._modules) == ["0", "2", "3", "4", "6", "7"]
    assert not any(isinstance(module, BinaryBlocks) for module in frozen.modules())
    assert same(fast, frozen, torch.randn(2, 4, 5, 5))


def test_nan_and_infinite_inputs():
    fast = accelerate(freeze(nn.Sequential(make_block(4, 4, shortcut=nn.Identity()))))
    x = torch.randn(1, 4, 3, 3)
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[0, 2, 2, 2] = torch.nan, torch.inf, -torch.inf
    assert fast(x)[0, 0, 0, 0].isnan()


# --- thresholds -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_a_threshold_tells_the_sign_of_a_batch_norm(scale, shift, x):
    norm = FrozenBatchNorm2d(1)
    norm.scale.fill_(scale)
    norm.shift.fill_(shift)
    threshold, falls = _thresholds(norm)
    around = [torch.nextafter(threshold, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    largest = torch.finfo(torch.float32).max
    values = torch.cat([threshold, *around, torch.tensor([x, 0.0, -0.0, largest, -largest])])
    values = values[values.isfinite()]
    positive = norm(values[:, None, None, None]).flatten() >= 0
    assert torch.equal((values >= threshold) ^ falls, positive)


@pytest.mark.parametrize(
    ("scale", "shift", "threshold"),
    [(2.0, -1.0, 0.5), (-2.0, 1.0, np.nextafter(np.float32(0.5), np.float32(1))), (1.0, 0.0, 0.0), (0.0, 1.0, -np.inf)],
)
def test_known_thresholds(scale, shift, threshold):
    norm = FrozenBatchNorm2d(1)
    norm.scale.fill_(scale)
    norm.shift.fill_(shift)
    found, falls = _thresholds(norm)
    assert falls.item() == (scale < 0)
    assert found.item() == threshold or (threshold == -np.inf and found.item() < -3.4e38)


# --- networks ---------------------------------------------------------------------------------------------------

FAST = [
    name for name in MODELS if name.startswith("PCNN") and not any(word in name for word in ("mcn", "tern", "full"))
]


@pytest.mark.parametrize("name", FAST)
def test_the_same_logits_bit_for_bit(name):
    frozen = freeze(trained(name))
    factors = torch.cat([module.scale for module in frozen.modules() if isinstance(module, FrozenBatchNorm2d)])
    assert (factors < 0).float().mean() > 0.1
    fast = accelerate(frozen)
    assert not any(isinstance(module, FrozenConv2d) for module in fast.modules())
    for batch, height, width in ((1, 33, 30), (3, 32, 32), (3, 9, 7)):
        images = torch.randn(batch, 3, height, width)
        assert same(fast, frozen, images, images.contiguous(memory_format=torch.channels_last))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", ["PCNN wrn7", "PCNN resnet18_cifar", "PCNN vgg_small"])
def test_the_same_logits_whatever_the_default_dtype(name):
    frozen = freeze(trained(name).float())
    images = torch.randn(2, *IMAGE_SHAPE, dtype=torch.float32)
    logits = accelerate(frozen)(images)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, frozen(images))


def test_empty_and_large_batches():
    frozen = freeze(trained("PCNN J=4"))
    fast = accelerate(frozen)
    assert fast(torch.empty(0, *IMAGE_SHAPE)).shape == (0, 10)
    images = torch.randn(runtime.PART + 1, 3, 8, 8)
    features = [frozen.features(part) for part in (images[:-1], images[-1:])]
    assert torch.equal(fast(images), frozen.classifier(torch.cat(features)))


def test_real_images_of_a_packed_network():
    data = tiny_digits(batch_size=100)
    data.setup("test")
    raw = next(iter(data.test_dataloader()))
    images, _ = data.on_after_batch_transfer(raw, 0)
    model = tiny_pcnn(widths=[4, 4, 8, 16])
    randomise(model.net)
    model.net.classifier.bias.data -= model.net(images).mean(dim=0)  # so that all classes occur
    packed = PackedNetwork(freeze(model.net), describe(model, image_size=(8, 8), mean=data.mean, std=data.std))
    fast = accelerate(packed)
    assert type(fast) is PackedNetwork
    assert fast.description == packed.description
    labels = fast.classify(raw.images)
    assert len(labels.unique()) > 2
    assert torch.equal(labels, packed.classify(raw.images))
    assert same(fast, packed, *packed.preprocess(raw.images).split(runtime.PART))


@pytest.mark.parametrize("wrap", [lambda network: network, freeze], ids=["trained", "frozen"])
def test_accelerate_does_not_modify_the_network(wrap):
    network = wrap(trained("PCNN J=1"))
    before, images = str(network), torch.randn(2, *IMAGE_SHAPE)
    logits = network(images)
    fast = accelerate(network.train()).train()
    assert str(network) == before
    assert network.training
    assert torch.equal(fast(images), logits)
    assert torch.equal(network.eval()(images), logits)
    assert not fast(images.requires_grad_()).requires_grad


def test_output_does_not_depend_on_threads():
    """More threads than numba has, and several callers at once."""
    frozen = freeze(trained("PCNN resnet18_cifar"))
    fast, images = accelerate(frozen), [torch.randn(batch, *IMAGE_SHAPE) for batch in (1, 2, 3, 5)]
    expected, before = [frozen(x) for x in images], numba.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = [fast(x) for x in images]
        with ThreadPoolExecutor(4) as pool:
            found += pool.map(fast, images)
    finally:
        torch.set_num_threads(1)
    assert numba.get_num_threads() == before
    for x, y in zip(found, expected * 2, strict=True):
        torch.testing.assert_close(x, y)  # the float convolutions of torch may be shared out in another way


def test_compiled_once():
    """All networks call the kernels with the same types, so that nothing is compiled twice."""
    from pcnn_lightning.deploy.xnor import run_blocks

    for name in ("PCNN resnet18_cifar", "PCNN vgg_small"):
        for batch in (1, 2):
            accelerate(trained(name))(torch.randn(batch, *IMAGE_SHAPE))
    assert len(run_blocks.signatures) == 1


def test_number_of_torch_threads_is_kept():
    """In its own process, because numba's first launch sets the number of threads."""
    code = """
import torch
torch.set_num_threads(1)
from pcnn_lightning import PCNN
from pcnn_lightning.deploy import accelerate
accelerate(PCNN(backbone="wrn7", widths=[2, 2, 2, 2], projections=1).net)(torch.randn(2, 3, 8, 8))
print(torch.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1"]


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("PCNN ternary", "is ternary"),
        ("PCNN full precision", "is of full precision"),
        ("PCNN mcn8", "has other blocks"),
        ("MCN K=4", "has real activations"),
        ("U-MCN", "has real activations"),
    ],
)
def test_unsupported_networks_are_refused(name, what):
    with pytest.raises(InputError, match=f"only blocks of sign activations .*, but this network {what}"):
        accelerate(trained(name))


def test_a_network_of_another_precision_is_refused():
    with pytest.raises(InputError, match=r"is of torch\.float64"):
        accelerate(trained("PCNN J=4").double())


def test_missing_numba_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(InputError, match=r"needs numba \(.*\): pip install '\.\[runtime\]'"):
        accelerate(trained("PCNN J=4"))


def test_numba_is_imported_lazily():
    code = "import sys, pcnn_lightning.deploy; assert not {'numba', 'llvmlite'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 4, 5, 5), torch.float64, r"in float32 on the CPU, but got torch\.float64 on cpu"),
        ((1, 5, 5, 5), torch.float32, r"of shape \(B, 4, H, W\), but got \(1, 5, 5, 5\)"),
        ((4, 5, 5), torch.float32, r"of shape \(B, 4, H, W\), but got \(4, 5, 5\)"),
        ((1, 4, 2, 5), torch.float32, "a side of images must be at least 3 pixels, but is 2"),
        (
            (1, 4, 5, 5),
            torch.float32,
            r"a shortcut to \(1, 4, 5, 5\) cannot be added to a convolution to \(1, 4, 3, 3\)",
        ),
    ],
)
def test_wrong_images_are_refused(shape, dtype, message):
    block = BinaryBlocks([freeze(make_block(4, 4, padding=0, shortcut=nn.Identity()))])
    with pytest.raises(ValueError, match=message):
        block(torch.zeros(shape, dtype=dtype))
