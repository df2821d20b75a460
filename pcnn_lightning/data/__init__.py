"""Datasets as LightningDataModules.

To add a dataset, write a subclass of :class:`ImageDataModule` and import it here.
"""

from pcnn_lightning.data.base import ImageDataModule
from pcnn_lightning.data.digits import Digits
from pcnn_lightning.data.downloads import CIFAR10, CIFAR100, MNIST, FashionMNIST
from pcnn_lightning.data.folder import ImageFolder
from pcnn_lightning.data.parquet import ParquetImages
from pcnn_lightning.data.webdataset import WebDataset

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
    "ParquetImages",
    "WebDataset",
]
