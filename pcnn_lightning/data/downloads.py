"""Datasets downloaded by torchvision."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torchvision import datasets

from pcnn_lightning.checks import check_path
from pcnn_lightning.data.augment import resize
from pcnn_lightning.data.base import ImageDataModule, Split
from pcnn_lightning.data.datasets import MemoryImages
from pcnn_lightning.errors import InputError, one_line


class DownloadedImages(ImageDataModule):
    """Base class of torchvision datasets that are downloaded to ``root`` if necessary and held in memory.

    Args:
        root: folder of the datasets.
        kwargs: see :class:`~pcnn_lightning.data.base.ImageDataModule`.
    """

    source: ClassVar[Any]
    """torchvision class with attributes ``data`` and ``targets`` and arguments ``root``, ``train`` and ``download``."""
    folder: ClassVar[str]
    """Subfolder of ``root`` in which torchvision looks for the files."""

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_path("root", root)
        self.root = root

    def prepare_data(self) -> None:
        """Download the dataset unless it is in ``root``.

        Raises:
            InputError: if the download fails.
        """
        try:
            self.source(self.root, download=True)
        except (OSError, RuntimeError) as error:
            name, place = type(self).__name__, Path(self.root) / self.folder
            raise InputError(
                f"{name} is not in {self.root} and could not be downloaded ({one_line(error)}); "
                f"put its files into {place}, or set --data.root to where they are"
            ) from None

    def load(self, split: Split) -> MemoryImages | None:
        if split == "val":
            return None
        try:
            source = self.source(self.root, train=split == "train")
        except Exception as error:  # for corrupt files, torchvision raises all kinds of exceptions
            place = Path(self.root) / self.folder
            raise InputError(f"{type(self).__name__} cannot be read from {place}: {one_line(error)}") from None
        images = torch.as_tensor(source.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return MemoryImages(images=resize(images, self.image_size), labels=torch.as_tensor(source.targets))


class MNIST(DownloadedImages):
    """70,000 gray images of handwritten digits, 28×28 pixels (LeCun et al., 1998); 10,000 are test images."""

    source = datasets.MNIST
    folder = "MNIST/raw"
    side = 28
    classes = [str(digit) for digit in range(10)]
    mean = (0.1307,)
    std = (0.3081,)

    def __init__(self, root: str = "data", crop_padding: int = 2, **kwargs: Any) -> None:
        super().__init__(root=root, crop_padding=crop_padding, **kwargs)


class FashionMNIST(DownloadedImages):
    """70,000 gray images of clothing, 28×28 pixels (Xiao et al., 2017); 10,000 are test images."""

    source = datasets.FashionMNIST
    folder = "FashionMNIST/raw"
    side = 28
    classes = datasets.FashionMNIST.classes
    mean = (0.2860,)
    std = (0.3530,)

    def __init__(self, root: str = "data", crop_padding: int = 2, **kwargs: Any) -> None:
        super().__init__(root=root, crop_padding=crop_padding, **kwargs)


class CIFAR10(DownloadedImages):
    """60,000 RGB images in 10 classes, 32×32 pixels (Krizhevsky, 2009); 10,000 are test images."""

    source = datasets.CIFAR10
    folder = "cifar-10-batches-py"
    side = 32
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def __init__(self, root: str = "data", crop_padding: int = 4, flip: bool = True, **kwargs: Any) -> None:
        super().__init__(root=root, crop_padding=crop_padding, flip=flip, **kwargs)


class CIFAR100(DownloadedImages):
    """60,000 RGB images in 100 classes, 32×32 pixels (Krizhevsky, 2009); 10,000 are test images."""

    source = datasets.CIFAR100
    folder = "cifar-100-python"
    side = 32
    classes = (  # noqa: SIM905  # a list of 100 string literals would be harder to read
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
        "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
        "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal "
        "shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank "
        "telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ).split()
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)

    def __init__(self, root: str = "data", crop_padding: int = 4, flip: bool = True, **kwargs: Any) -> None:
        super().__init__(root=root, crop_padding=crop_padding, flip=flip, **kwargs)
