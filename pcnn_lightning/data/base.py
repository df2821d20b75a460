"""Base class of the image data modules."""

import signal
import zlib
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from pcnn_lightning.checks import check_bool, check_integer, check_number, check_share
from pcnn_lightning.data.augment import crop_and_flip, erase, flip, mix, normalize
from pcnn_lightning.data.datasets import Augmentation, ImageSet, RawBatch
from pcnn_lightning.data.sampling import (
    EpochLoader,
    EpochSampler,
    Stream,
    generator,
    stratified_order,
)
from pcnn_lightning.errors import InputError

Split = Literal["train", "val", "test"]

_NEEDED = {
    "fit": ("train_set", "val_set"),
    "validate": ("val_set",),
    "test": ("test_set",),
    "predict": ("predict_set",),
}


class ImageDataModule(LightningDataModule, ABC):
    """Base class of data modules with labelled images for training, validation, testing and prediction.

    Modules receive ``(images, labels)``, (B, C, H, W) float32 and (B,) int64, or only ``images`` for prediction. With
    mixup or cutmix, the labels of training are probabilities, (B, num_classes) float32. Batches are augmented and
    normalized on the device that uses them. Order and augmentation depend on (seed, epoch, image) alone, not on the
    number of workers or processes, on the global random state, or on whether the run was resumed from a checkpoint.

    To add a dataset, write a subclass that sets the class attributes below and implements :meth:`load`.

    Args:
        batch_size: number of images per batch and process.
        num_workers: number of worker processes of each data loader; 0 is best for datasets held in memory.
        val_fraction: fraction of the training images held out for validation, stratified by class; at least 0 and
            below 1. 0 disables validation. Ignored if the dataset has its own validation images.
        train_size: number of images to train on, stratified by class; None takes all that are not held out.
        seed: seed of the split, the order and the augmentation; at least 0.
        crop_padding: black pixels added on each side of training images held in memory, before a random crop to the
            original size; 0 disables cropping.
        flip: flip training images horizontally with probability 0.5.
        image_size: height and width to which images are resized, in pixels; None keeps the original size.
        random_erasing: probability with which a random box of a training image is erased, with 2 to 33 % of the area.
        mixup_alpha: mix each training image with another one of its batch, in shares λ and 1 - λ, with λ from
            Beta(α, α); 0 turns it off.
        cutmix_alpha: paste a box of another image of the batch into each training image, with a share of 1 - λ of the
            area, likewise. With mixup as well, each image is mixed by one of them, drawn with probability 0.5.
        weighted_sampling: draw the training images of an epoch with replacement, each class equally often on average.

    Raises:
        ValueError: if an argument is of the wrong type or out of range.
    """

    classes: list[str]
    """Class names, indexed by label."""
    mean: tuple[float, ...]
    """Mean per channel of pixels scaled to [0, 1]; a constant, so that deployed networks can use the same one."""
    std: tuple[float, ...]
    """Standard deviation per channel of pixels scaled to [0, 1]."""
    side: ClassVar[int]
    """Original height and width of the images, in pixels."""

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        train_size: int | None = None,
        seed: int = 0,
        crop_padding: int = 0,
        flip: bool = False,
        image_size: int | None = None,
        random_erasing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        weighted_sampling: bool = False,
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        check_number("val_fraction", val_fraction, 0, below=1)
        if train_size is not None:
            check_integer("train_size", train_size, 1)
        check_integer("seed", seed, 0)
        check_integer("crop_padding", crop_padding, 0)
        check_bool("flip", flip)
        if image_size is not None:
            check_integer("image_size", image_size, 1)
        check_share("random_erasing", random_erasing)
        check_number("mixup_alpha", mixup_alpha, 0)
        check_number("cutmix_alpha", cutmix_alpha, 0)
        check_bool("weighted_sampling", weighted_sampling)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.train_size = train_size
        self.seed = seed
        self.crop_padding = crop_padding
        self.flip = flip
        self.image_size = image_size
        self.weighted_sampling = weighted_sampling
        self._augmentation = Augmentation(seed, crop_padding, flip, random_erasing, mixup_alpha, cutmix_alpha)
        self._mean, self._std = (
            255 * torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std)
        )

    @property
    def num_classes(self) -> int:
        """Number of classes; available before any image is read."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """Number of channels of the images: 1 for gray, 3 for RGB."""
        return len(self.mean)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images that a network receives."""
        side = self.side if self.image_size is None else self.image_size
        return self.in_channels, side, side

    @abstractmethod
    def load(self, split: Split) -> ImageSet | None:
        """Load a split, or return None if the dataset does not have it.

        Raises:
            InputError: if the data are missing or corrupt.
        """

    def setup(self, stage: str) -> None:
        """Load the splits that ``stage`` ("fit", "validate", "test" or "predict") needs, if not loaded yet.

        Raises:
            InputError: if there are no images for the stage, or they are invalid.
        """
        for name in _NEEDED[stage]:
            getattr(self, name)  # reading a cached property loads the split
        if stage == "validate" and self.val_set is None:
            raise InputError("There are no validation images: val_fraction is 0 and the dataset has none.")

    @cached_property
    def train_set(self) -> ImageSet:
        """Training images, with augmentation."""
        return self._split[0]

    @cached_property
    def val_set(self) -> ImageSet | None:
        """Validation images: those of the dataset, or held out from its training images; None if there are none."""
        return self._split[1] if self._own_val_set is None else self._own_val_set

    @cached_property
    def test_set(self) -> ImageSet:
        """Test images, which are used for nothing else."""
        return self._load("test", "Use `validate` instead, or add test images.")

    @property
    def class_counts(self) -> list[int]:
        """Number of training images of each class, by label."""
        labels = self.train_set.labels
        assert labels is not None
        counts: list[int] = labels.bincount(minlength=self.num_classes).tolist()
        return counts

    @cached_property
    def predict_set(self) -> ImageSet:
        """Images to predict, without labels."""
        return self.test_set.unlabelled()

    def predict_names(self) -> list[str]:
        """Return the names of the samples of ``predict_set``, in order."""
        return [str(index) for index in range(len(self.predict_set))]

    @property
    def is_fitting(self) -> bool:
        """Whether a Trainer uses the images for training."""
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint tells of the images, so that others can be predicted with it: primitives only."""
        shape, mean, std = self.image_shape, self.mean, self.std
        return {"classes": list(self.classes), "image_shape": list(shape), "mean": list(mean), "std": list(std)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a run goes on with the same classes.

        Raises:
            InputError: if they have changed.
        """
        if self.is_fitting and state_dict["classes"] != list(self.classes):
            raise InputError(
                f"the checkpoint is of the classes {', '.join(state_dict['classes'])}, but these images are of "
                f"{', '.join(self.classes)}"
            )

    @cached_property
    def _own_val_set(self) -> ImageSet | None:
        images = self.load("val")
        if images is not None:
            self._check_labels("val", images)
        return images

    @cached_property
    def _split(self) -> tuple[ImageSet, ImageSet | None]:
        """Training images, and those held out for validation unless the dataset has its own validation images."""
        whole = self._load("train", "Add training images.")
        assert whole.labels is not None
        order, val = stratified_order(whole.labels, generator(self.seed, Stream.SPLIT)), None
        if self._own_val_set is None and self.val_fraction > 0 and len(order) > 1:
            held_out = min(max(round(self.val_fraction * len(order)), 1), len(order) - 1)
            val, order = whole.select(order[:held_out]), order[held_out:]
        if self.train_size is not None:
            if self.train_size > len(order):
                raise InputError(
                    f"train_size must be at most {len(order)}, the number of training images left, "
                    f"but got {self.train_size}"
                )
            order = order[: self.train_size]
        train = whole.select(order).augmented(self._augmentation)
        return train, val

    def _load(self, split: Split, advice: str) -> ImageSet:
        images = self.load(split)
        if images is None:
            raise InputError(f"{type(self).__name__} has no {split} images here. {advice}")
        self._check_labels(split, images)
        return images

    def _check_labels(self, split: Split, images: ImageSet) -> None:
        assert images.labels is not None
        if len(images.labels) != len(images):
            raise InputError(f"The {split} split has {len(images)} images but {len(images.labels)} labels")
        for value in (int(images.labels.min()), int(images.labels.max())):
            if not 0 <= value < self.num_classes:
                raise InputError(f"The {split} split has the label {value}; allowed are 0 to {self.num_classes - 1}")

    def train_dataloader(self) -> EpochLoader:
        """Return a loader of training batches, reshuffled each epoch."""
        train = self.train_set
        world_size, rank = self._processes()
        # A small last batch makes BatchNorm noisy. Keep it if it is the only one.
        drop_last = len(train) // world_size >= self.batch_size
        weighted = train.labels if self.weighted_sampling else None
        sampler = EpochSampler(train, self.seed, world_size, rank, drop_last, weighted)
        loader = EpochLoader(train, sampler=sampler, drop_last=drop_last, **self._loader_options())
        if train.labels is not None:
            loader.checksum = zlib.crc32(train.labels.numpy().tobytes())
        if self.trainer:
            loader.loop = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return a loader of validation batches, or an empty list to make Lightning skip validation."""
        return [] if self.val_set is None else self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return a loader of test batches."""
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return a loader of batches to predict, in the order of :meth:`predict_names`."""
        return DataLoader(self.predict_set, **self._loader_options())

    def _evaluation_loader(self, images: ImageSet) -> DataLoader[Any]:
        world_size, rank = self._processes()
        if len(images) < world_size:
            raise InputError(f"{len(images)} images to evaluate on cannot be dealt out to {world_size} processes")
        # By default, Lightning inserts a sampler that repeats some images, which distorts the metrics.
        sampler = UnrepeatedDistributedSampler(images, world_size, rank, shuffle=False)
        return DataLoader(images, sampler=sampler, **self._loader_options())

    def _processes(self) -> tuple[int, int]:
        """World size and rank of this process."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": as_it_is,
            "worker_init_fn": leave_interrupts_to_the_first_process if self.num_workers > 0 else None,
            "generator": torch.Generator(),  # otherwise, a DataLoader draws from the global random state
        }

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> tuple[Tensor, Tensor] | Tensor:
        """Augment and normalize a batch on the device.

        Returns:
            Images (B, C, H, W) float32 and labels (B,) int64, or the probabilities of the labels (B, num_classes)
            float32 if the images are mixed; only the images if there are no labels.
        """
        images = batch.images
        if batch.flips is not None and batch.offsets is not None:
            images = crop_and_flip(images, batch.offsets, batch.flips, self.crop_padding)
        elif batch.flips is not None:
            images = flip(images, batch.flips)
        if self._mean.device != images.device:  # only once, not for every batch
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        images = normalize(images, self._mean, self._std)
        if batch.erased is not None:
            images = erase(images, batch.erased)
        if batch.labels is None:
            return images
        if batch.shares is None or batch.pasted is None:
            return images, batch.labels
        return mix(images, batch.labels, batch.shares, batch.pasted, self.num_classes)


def leave_interrupts_to_the_first_process(_: int) -> None:
    """Make a worker ignore Ctrl-C, which ends it by way of the process that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def as_it_is(batch: Any) -> Any:
    """Collate nothing: a loader's data set makes whole batches."""
    return batch
