"""Data sets as LightningDataModules. A new one is a class of its own and a line here."""

from pcnn_lightning.data.base import ImageDataModule
from pcnn_lightning.data.digits import Digits
from pcnn_lightning.data.downloads import CIFAR10, CIFAR100, MNIST, FashionMNIST
from pcnn_lightning.data.folder import ImageFolder

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "Digits", "FashionMNIST", "ImageDataModule", "ImageFolder"]
