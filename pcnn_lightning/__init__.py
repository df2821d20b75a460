"""Train 1-bit convolutional networks in PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcnn_lightning.callbacks import (
        Diversity,
        FilterCurves,
        FlipRatio,
        GradientNorms,
        KernelHistograms,
        LossCurves,
        PredictionWriter,
        StageCheckpoint,
        StageProgressBar,
        StageSwitch,
    )
    from pcnn_lightning.data import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST, ImageFolder
    from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, SignActivation
    from pcnn_lightning.losses import CenterLoss
    from pcnn_lightning.modules import MCN, PCNN

__version__ = "0.1.0.dev0"

_ROOMS = {
    "callbacks": (
        *("Diversity", "FilterCurves", "FlipRatio", "GradientNorms", "KernelHistograms", "LossCurves"),
        *("PredictionWriter", "StageCheckpoint", "StageProgressBar", "StageSwitch"),
    ),
    "data": ("CIFAR10", "CIFAR100", "MNIST", "Digits", "FashionMNIST", "ImageFolder"),
    "layers": ("ModulatedConv2d", "ProjectionConv2d", "SignActivation"),
    "losses": ("CenterLoss",),
    "modules": ("MCN", "PCNN"),
}

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MCN",
    "MNIST",
    "PCNN",
    "CenterLoss",
    "Digits",
    "Diversity",
    "FashionMNIST",
    "FilterCurves",
    "FlipRatio",
    "GradientNorms",
    "ImageFolder",
    "KernelHistograms",
    "LossCurves",
    "ModulatedConv2d",
    "PredictionWriter",
    "ProjectionConv2d",
    "SignActivation",
    "StageCheckpoint",
    "StageProgressBar",
    "StageSwitch",
]


def __getattr__(name: str) -> Any:
    # Found when first asked for, so that whoever wants only the layers does not wait for Lightning to be imported.
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
