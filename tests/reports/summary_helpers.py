"""Networks to summarize, and the counts of a row."""

from torch import nn

from pcnn_lightning.backbones import build_backbone
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, SignActivation

CIFAR, DIGITS = (3, 32, 32), (1, 16, 16)
COUNTS = ("parameters_1bit", "parameters_2bit", "parameters_32bit", "macs_1bit", "macs_32bit")


def build(name, *, family="projection", planes=1, num_classes=10, in_channels=3, widths=None, **arguments):
    def convolution(*shape, planes=planes):
        if family == "projection":
            return ProjectionConv2d(*shape, projections=planes, **arguments)
        if family == "modulated":
            return ModulatedConv2d(*shape, planes=planes, **arguments)
        return nn.Conv2d(*shape, bias=False)

    activation = SignActivation if family == "projection" else nn.Identity
    return build_backbone(name, num_classes, in_channels, convolution, activation, planes=planes, widths=widths)


def counts(row):
    return tuple(getattr(row, name) for name in COUNTS)
