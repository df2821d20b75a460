"""Train 1-bit convolutional networks in PyTorch Lightning."""

from pcnn_lightning.callbacks import LossCurves, PredictionWriter, StageCheckpoint, StageSwitch
from pcnn_lightning.data import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST, ImageFolder
from pcnn_lightning.layers import ProjectionConv2d, SignActivation
from pcnn_lightning.losses import CenterLoss
from pcnn_lightning.modules import PCNN

__version__ = "0.1.0.dev0"

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "PCNN",
    "CenterLoss",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "LossCurves",
    "PredictionWriter",
    "ProjectionConv2d",
    "SignActivation",
    "StageCheckpoint",
    "StageSwitch",
]
