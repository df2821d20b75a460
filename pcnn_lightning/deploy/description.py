"""The description of a network in a packed or exported file."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from pcnn_lightning.backbones import BACKBONES, BLOCK_OPTIONS
from pcnn_lightning.backbones.external import ACTIVATIONS
from pcnn_lightning.errors import InputError
from pcnn_lightning.families import FAMILIES

LARGEST = 2**20
"""Upper bound of channels, classes and pixels per side, and of the magnitude of means and standard deviations."""
SMALLEST_STD = 1e-6
"""Lower bound of standard deviations: images are divided by them in float32, where much smaller ones are 0."""
_LATER = {"conversion", "block"}  # fields that the first files do not have


@dataclass(frozen=True)
class Description:
    """Everything needed to build a network without its weights, to feed it and to name its classes.

    Lists are converted to tuples.

    Attributes:
        family: a name in ``pcnn_lightning.families.FAMILIES``.
        stage: a name in ``pcnn_lightning.stages.STAGES``.
        backbone: a name in ``pcnn_lightning.backbones.BACKBONES``, or that of a network of torchvision or timm.
        num_classes: number of classes.
        in_channels: number of channels of the images.
        image_size: (H, W) of the images, in pixels.
        mean: mean of each channel over the training images, with pixels scaled to 0..1.
        std: standard deviation of each channel, likewise; at least 1e-6.
        widths: number of feature maps of the stem and of each stage; None takes the backbone's own.
        planes: channels per feature map, such as J of PCNN or K of MCN.
        sign_activations: whether the 1-bit layers convolve signs, not real-valued activations.
        layer: ``options`` of the frozen 1-bit layers.
        class_names: names of the classes, by label; None if they have none.
        conversion: of a network from outside this package: ``layers``, the names of its 1-bit layers with their own
            options; ``activations`` in front of them, ``real``, ``sign``, ``threshold``, or ``off`` for signs that are
            not enabled; whether it is for ``small_images``; and the function of the user that makes it, ``own``, or
            None.
        block: options of the blocks of the backbone, of ``pcnn_lightning.backbones.BLOCK_OPTIONS``.

    Raises:
        InputError: names what is wrong, its value and what is allowed.
    """

    family: str
    stage: str
    backbone: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    widths: tuple[int, ...] | None = None
    planes: int = 1
    sign_activations: bool = True
    layer: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    conversion: dict[str, Any] | None = None
    block: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std", "widths", "class_names"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        known = isinstance(self.family, str) and self.family in FAMILIES
        self._require("family", known, f"one of {', '.join(FAMILIES)}, or registered by register_family")
        self._one_of("stage", (*FAMILIES[self.family].layer.stages, "full_precision"))
        if self.conversion is None:
            self._one_of("backbone", tuple(BACKBONES))
        self._require("conversion", self.conversion is None or _is_conversion(self.conversion), "None, or a conversion")
        self._one_of("sign_activations", (False, True))
        options = isinstance(self.layer, dict) and all(map(_is_option, self.layer.values()))
        self._require("layer", options, "an object of strings, integers, booleans and nulls")
        self._require("block", _is_block(self.block), f"an object of booleans by {', '.join(BLOCK_OPTIONS)}")
        for name in ("num_classes", "in_channels", "planes"):
            self._require(name, _is_size(getattr(self, name)), f"an integer from 1 to {LARGEST}")
        self._require("image_size", _is_row(self.image_size, _is_size, 2), f"two integers from 1 to {LARGEST}")
        known = self.widths is None or _is_row(self.widths, _is_size)
        self._require("widths", known, f"None, or integers from 1 to {LARGEST}")
        for name, allowed, lowest in (("mean", _is_number, -LARGEST), ("std", _is_std, SMALLEST_STD)):
            numbers = _is_row(getattr(self, name), allowed, self.in_channels)
            what = f"{self.in_channels} numbers from {lowest} to {LARGEST}"
            self._require(name, numbers, f"{what}, as many as in_channels")
        named = self.class_names is None or _is_row(self.class_names, _is_text, self.num_classes)
        self._require("class_names", named, f"None, or {self.num_classes} strings, as many as num_classes")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; without ``conversion`` and ``block`` if empty, as files had it before."""
        return {name: value for name, value in asdict(self).items() if name not in _LATER or value}

    @classmethod
    def from_dict(cls, content: object) -> "Description":
        """Build a description from what :meth:`as_dict` returned, read back from JSON.

        Raises:
            InputError: if ``content`` is not such an object.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or set(content) | _LATER != names:
            raise InputError(f"its description must be an object of {', '.join(sorted(names))}")
        return cls(**content)

    def check_images(self, images: Tensor) -> None:
        """Require raw images, (B, C, H, W) uint8, of the described size.

        Raises:
            ValueError: if they have another dtype or shape.
        """
        shape = (self.in_channels, *self.image_size)
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != shape:
            raise ValueError(
                f"images must be uint8 of shape (B, {', '.join(map(str, shape))}), "
                f"but got {images.dtype} of shape {tuple(images.shape)}"
            )

    def _one_of(self, name: str, allowed: tuple[object, ...]) -> None:
        value = getattr(self, name)
        # Compare types too, since 1 == True in Python; a list from JSON is not hashable.
        known = any(type(value) is type(item) and value == item for item in allowed)
        self._require(name, known, f"one of {', '.join(map(str, allowed))}")

    def _require(self, name: str, met: bool, allowed: str) -> None:
        if not met:
            value = repr(getattr(self, name))
            shown = value if len(value) <= 100 else f"{value[:100]}..."
            raise InputError(f"{name} must be {allowed}, but is {shown}")


def _is_row(value: object, allowed: Any, length: int | None = None) -> bool:
    return isinstance(value, tuple) and (length is None or len(value) == length) and all(map(allowed, value))


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # type: ignore[arg-type]


def _is_std(value: object) -> bool:
    return _is_number(value) and value >= SMALLEST_STD  # type: ignore[operator]


def _is_option(value: object) -> bool:
    return value is None or type(value) in (str, int, bool)


def _is_block(value: object) -> bool:
    return isinstance(value, dict) and all(one in BLOCK_OPTIONS and type(on) is bool for one, on in value.items())


def _is_conversion(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"layers", "activations", "small_images", "own"}:
        return False
    layers = value["layers"]
    return (
        isinstance(layers, dict)
        and all(isinstance(options, dict) and all(map(_is_option, options.values())) for options in layers.values())
        and value["activations"] in (*ACTIVATIONS, "off")
        and type(value["small_images"]) is bool
        and (value["own"] is None or isinstance(value["own"], str))
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)
