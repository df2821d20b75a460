"""Networks of all kinds, as if trained."""

from typing import Any

import torch
from tiny import fit, tiny_digits, tiny_mcn, tiny_pcnn
from torch import nn

from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.layers import SignActivation, TwoSlopePReLU

IMAGE_SHAPE = (3, 33, 30)
WIDTHS = {name: [4, 6, 8] if name == "vgg_small" else [4, 4, 6, 8] for name in BACKBONES}
WIDTHS |= {name: [4, 4, 6, 8, 8] for name in BACKBONES if name.startswith("resnet")}
MODELS: dict[str, Any] = {f"PCNN {name}": (tiny_pcnn, {"backbone": name}) for name in BACKBONES}
MODELS |= {f"MCN {name}": (tiny_mcn, {"backbone": name}) for name in BACKBONES}
MODELS |= {
    "PCNN J=1": (tiny_pcnn, {"projections": 1}),
    "PCNN J=4": (tiny_pcnn, {"projections": 4}),
    "PCNN mean": (tiny_pcnn, {"projection_forward": "mean"}),
    "PCNN ternary": (tiny_pcnn, {"stage": "ternary"}),
    "PCNN ternary J=1": (tiny_pcnn, {"stage": "ternary", "projections": 1}),
    "PCNN polynomial": (tiny_pcnn, {"activation_gradient": "polynomial"}),
    "PCNN block options": (
        tiny_pcnn,
        {"activation_threshold": True, "two_slopes": True, "normalization": "standardize", "projections": 4},
    ),
    "PCNN block options vgg_small": (
        tiny_pcnn,
        {"activation_threshold": True, "two_slopes": True, "backbone": "vgg_small", "stage": "ternary"},
    ),
    "PCNN full precision, two slopes": (tiny_pcnn, {"full_precision": True, "two_slopes": True}),
    "PCNN full precision": (tiny_pcnn, {"full_precision": True}),
    "PCNN full precision mcn8": (tiny_pcnn, {"full_precision": True, "backbone": "mcn8"}),
    "MCN K=1": (tiny_mcn, {"planes": 1}),
    "MCN K=4": (tiny_mcn, {"planes": 4}),
    "MCN-1": (tiny_mcn, {"average": True}),
    "MCN scale": (tiny_mcn, {"scale": 0.1}),
    "MCN U=3": (tiny_mcn, {"levels": 3}),
    "MCN U=4": (tiny_mcn, {"levels": 4}),
    "MCN-1 U=3": (tiny_mcn, {"levels": 3, "average": True}),
    "U-MCN": (tiny_mcn, {"binarize": False}),
    "U-MCN-1": (tiny_mcn, {"binarize": False, "average": True}),
    "MCN dropout": (tiny_mcn, {"dropout": 0.5}),
}


def trained_model(name, seed=0):
    """A model with random batch norms, thresholds and PReLUs; a third of the batch norms' factors are negative."""
    make, arguments = MODELS[name]
    torch.manual_seed(seed)
    arguments = {"in_channels": 3, **arguments}
    backbone = arguments.get("backbone", "wrn7" if make is tiny_pcnn else "mcn8")
    model = make(widths=WIDTHS[backbone], center_loss_weight=0.1, **arguments).eval()
    for module in model.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_(0.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2)
        elif isinstance(module, nn.PReLU):
            module.weight.data.normal_()
        elif isinstance(module, TwoSlopePReLU):
            module.positive.data.normal_()
            module.negative.data.normal_()
        elif isinstance(module, SignActivation) and module.threshold is not None:
            module.threshold.data.normal_()
            module.is_set.fill_(True)
    return model


def trained(name, seed=0):
    return trained_model(name, seed).net


def trained_digits(name):
    """A model after two epochs of digits, the first one ternary for PCNN, and its data."""
    torch.manual_seed(0)
    data, widths = tiny_digits(train_size=None, image_size=16, batch_size=32), [4, 4, 8, 16]
    model = tiny_pcnn(widths=widths, stage="ternary") if name == "PCNN" else tiny_mcn(widths=widths)
    fit(model, data)
    model.set_stage("binary")
    fit(model, data)
    return model.eval(), data
