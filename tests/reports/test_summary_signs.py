"""Which convolutions the summary counts as 1-bit."""

import pytest
import torch
import torch.nn.functional as F
from summary_helpers import CIFAR, build
from torch import nn

from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, SignActivation
from pcnn_lightning.reports.summary import summarize


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


MOVES = {
    "nothing": lambda x: x,
    "a slice": lambda x: x[..., ::2, ::2],
    "planes below one another": lambda x: x[..., ::2, ::2].reshape(len(x), 4, -1, x.shape[-1] // 2),
    "a copy": lambda x: x.clone().contiguous(memory_format=torch.channels_last),
    "repeated channels": lambda x: x.repeat_interleave(2, dim=1)[:, 2:6],
    "a max-pool that rounds up": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "a max-pool that pads": lambda x: F.max_pool2d(x, 3, 2, 1),
}
CHANGES = {
    "relu": F.relu,
    "an average": lambda x: F.avg_pool2d(x, 2),
    "the mean": lambda x: x.mean(dim=(2, 3), keepdim=True),
    "a scale": lambda x: 0.5 * x,
    "a sum": lambda x: x + x,
    "a shortcut": lambda x: x + torch.nan,
    "zeros around": lambda x: F.pad(x, (1, 1)),
}


@pytest.mark.parametrize("shape", [(4, 8, 6), (4, 7, 9)], ids=str)
@pytest.mark.parametrize(("way", "binary"), [*((way, True) for way in MOVES), *((way, False) for way in CHANGES)])
def test_signs_are_traced_to_the_convolution(way, binary, shape):
    middle = Function({**MOVES, **CHANGES}[way])
    layer = ProjectionConv2d(4, 4, 1)
    one_bit = [row.macs_1bit > 0 for row in summarize(nn.Sequential(SignActivation(), middle, layer), shape).layers]
    assert one_bit == [binary]


@pytest.mark.parametrize(
    "between",
    [[nn.Dropout(0.5)], [nn.MaxPool2d(2)], [nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.1)]],
    ids=["dropout", "pool", "several"],
)
def test_dropout_and_pools_keep_signs(between):
    network = nn.Sequential(nn.BatchNorm2d(4), SignActivation(), *between, ProjectionConv2d(4, 8, 3, padding=1))
    assert summarize(network.train(), (4, 6, 6)).total.macs_32bit == 0


@pytest.mark.parametrize(
    "between",
    [[nn.BatchNorm2d(4)], [nn.PReLU(4)], [nn.Conv2d(4, 4, 1)], [ProjectionConv2d(4, 4, 1)], [nn.PReLU(4), nn.ReLU()]],
    ids=["norm", "prelu", "conv", "projection", "relu"],
)
def test_values_computed_from_signs_are_real(between):
    network = nn.Sequential(SignActivation(), *between, ProjectionConv2d(4, 8, 3))
    (row,) = [row for row in summarize(network, (4, 6, 6)).layers if row.layer == str(len(network) - 1)]
    assert (row.macs_1bit, row.macs_32bit) == (0, 8 * 36 * 16)


@torch.no_grad()
@pytest.mark.parametrize("before", [[], [SignActivation()]], ids=["image", "signs"])
def test_real_values_that_happen_to_be_plus_or_minus_one_are_real(before):
    constant, dead, layer = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), ProjectionConv2d(2, 2, 1)
    for module, value in ((constant, 1.0), (dead, -1.0)):  # constant output
        module.weight.zero_()
        module.bias.fill_(value)
    for between in ([constant], [constant, dead]):
        assert summarize(nn.Sequential(*before, *between, layer), (2, 3, 3)).total.macs_1bit == 0
    assert summarize(nn.Sequential(Function(lambda image: image + 1), layer), (2, 3, 3)).total.macs_1bit == 0
    assert summarize(nn.Sequential(Function(lambda image: image - 1), layer), (2, 3, 3)).total.macs_1bit == 0


def test_only_projection_layers_multiply_at_one_bit():
    for layer in (ModulatedConv2d(4, 4, 3, planes=2), nn.Conv2d(4, 4, 3)):
        assert summarize(nn.Sequential(SignActivation(), layer), (4, 5, 5)).total.macs_1bit == 0


def test_the_first_layer_of_mcn_backbones_sees_the_image():
    real = [row.layer for row in summarize(build("mcn8", planes=4), CIFAR).layers if row.macs_32bit]
    assert real == ["features.stem", "classifier"]
    rows = summarize(build("mcn8", planes=4), (3, 31, 33)).layers  # shortcuts whose planes cannot be a view
    assert [row.layer for row in rows if row.macs_32bit] == real
