"""Small backbones of each family, and the equations of their parts."""

import reference
import torch
import torch.nn.functional as F
from torch import nn

from pcnn_lightning.backbones import BACKBONES, OneBitBlock, build_backbone
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, QuantizedConv2d, SignActivation, TwoSlopePReLU

SMALL = {name: [4, 6, 8] if name == "vgg_small" else [4, 4, 6, 8] for name in BACKBONES}
SMALL |= {name: [4, 4, 6, 8, 8] for name in BACKBONES if name.startswith("resnet")}

# The backbones of MCN repeat their input; in the others the first convolution and the shortcuts are full precision.
MCN_BACKBONES = [name for name in BACKBONES if name.startswith("mcn")]
PCNN_BACKBONES = [name for name in BACKBONES if name not in MCN_BACKBONES]

# The number of 1-bit convolutions: all 3×3 ones but the first; in MCN's backbones also the first and two shortcuts.
ONE_BIT_CONVOLUTIONS = {
    "wrn7": 3,
    "wrn10": 6,
    "wrn22": 18,
    "wrn40": 36,
    "resnet18": 16,
    "resnet34": 32,
    "resnet18_cifar": 16,
    "resnet34_cifar": 32,
    "vgg_small": 5,
    "mcn8": 7 + 2,
    "mcn20": 19 + 2,
    "mcn_small": 4,
}


def factories(family, default_planes):
    """The factories of a family's convolutions (with a keyword ``planes``) and of its activations."""

    def projection(*shape, planes=default_planes):
        return ProjectionConv2d(*shape, projections=planes)

    def modulated(*shape, planes=default_planes):
        return ModulatedConv2d(*shape, planes=planes, filter_loss_weight=0.1)

    def full(*shape, planes=default_planes):
        return nn.Conv2d(*shape, bias=False)

    return {
        "projection": (projection, SignActivation),
        "modulated": (modulated, nn.Identity),
        "full": (full, nn.Identity),
    }[family]


def build(name, *, num_classes=10, in_channels=3, planes=1, family="projection", **arguments):
    convolution, activation = factories(family, planes)
    return build_backbone(name, num_classes, in_channels, convolution, activation, planes=planes, **arguments)


def build_sizes_only(name, **arguments):
    with torch.device("meta"):
        return build(name, **arguments)


def modules_of(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


def one_bit_layers(network):
    return modules_of(network, QuantizedConv2d)


def inputs_of_one_bit_layers(network, images):
    seen = []
    for layer in one_bit_layers(network):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    network(images)
    return seen


def randomise(module):
    """Give batch norms, PReLUs and thresholds random parameters, so that no factor is one and no shift is zero."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values, shift in ((part.weight, 1), (part.bias, 0), (part.running_mean, 0)):
                values.data.copy_(shift + 0.5 * torch.randn(values.shape, generator=generator))
            part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
        elif isinstance(part, (nn.PReLU, TwoSlopePReLU)):
            for slopes in part.parameters():
                slopes.data.copy_(torch.randn(slopes.shape, generator=generator))
        elif isinstance(part, SignActivation) and part.threshold is not None:
            part.threshold.data.copy_(torch.randn(part.threshold.shape, generator=generator))


def trained(name, **arguments):
    torch.manual_seed(0)
    network = build(name, **{"widths": SMALL[name], "planes": 2, **arguments}).double().eval()
    randomise(network)
    return network


def blocks_of(name, **arguments):
    return modules_of(trained(name, **arguments), OneBitBlock)


def normalise(x, norm):
    centred = (x - norm.running_mean.reshape(-1, 1, 1)) / (norm.running_var.reshape(-1, 1, 1) + norm.eps).sqrt()
    return centred * norm.weight.reshape(-1, 1, 1) + norm.bias.reshape(-1, 1, 1)


def convolution_branch(x, block, stride):
    quantized = reference.quantize(block.conv.weight, block.conv.projection, levels=block.conv.levels)
    return F.conv2d(reference.sign(normalise(x, block.norm)), quantized, stride=stride, padding=1)


def prelu(x, block):
    return torch.where(x > 0, x, block.prelu.weight.reshape(-1, 1, 1) * x)


def pool_windows(x, reduce):
    """Reduce each 2×2 window to one number; windows over the edge are cropped."""
    rows, columns = range(0, x.shape[-2], 2), range(0, x.shape[-1], 2)
    return torch.stack(
        [torch.stack([reduce(x[..., r : r + 2, c : c + 2], dim=(-2, -1)) for c in columns], dim=-1) for r in rows],
        dim=-2,
    )
