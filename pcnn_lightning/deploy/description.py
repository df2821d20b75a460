"""What a packed file says of its network."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.errors import InputError

LARGEST = 2**20
"""More channels, classes or pixels a side than any network here will have."""


@dataclass(frozen=True)
class Description:
    """All that it takes to build a network without its numbers, to feed it and to name what it answers.

    Lists are taken for tuples.

    Attributes:
        family: ``"PCNN"`` or ``"MCN"``.
        stage: ``"binary"``, ``"ternary"`` (PCNN only) or ``"full_precision"`` (of an MCN: U-MCN).
        backbone: a name in ``pcnn_lightning.backbones.BACKBONES``.
        stages: kernel stages: maps of the stem and of each stage; None is the backbone's own.
        planes: J or K, channels per map.
        levels: U of an MCN: 2, 3 or 4.
        average: MCN-1: one number a plane.
        num_classes: number of classes.
        in_channels: channels of the images.
        image_size: (H, W) of the images, in pixels.
        mean: of the pixels that the network was trained on, per channel, scaled to 0..1.
        std: of those pixels, likewise.
        class_names: names of the classes, by label; None where they have none.

    Raises:
        InputError: names what is wrong, its value and what is allowed.
    """

    family: Literal["PCNN", "MCN"]
    stage: Literal["binary", "ternary", "full_precision"]
    backbone: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stages: tuple[int, ...] | None = None
    planes: int = 1
    levels: int = 2
    average: bool = False
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std", "stages", "class_names"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        stages = ("binary", "ternary", "full_precision") if self.family == "PCNN" else ("binary", "full_precision")
        self._one_of("family", ("PCNN", "MCN"))
        self._one_of("stage", stages)
        self._one_of("backbone", tuple(BACKBONES))
        self._one_of("levels", (2, 3, 4))
        self._one_of("average", (False, True))
        for name in ("num_classes", "in_channels", "planes"):
            self._require(name, _is_size(getattr(self, name)), f"an integer from 1 to {LARGEST}")
        self._require("image_size", _is_row(self.image_size, _is_size, 2), f"two integers from 1 to {LARGEST}")
        known = self.stages is None or _is_row(self.stages, _is_size)
        self._require("stages", known, f"None, or integers from 1 to {LARGEST}")
        for name, allowed, what in (("mean", _is_number, "finite"), ("std", _is_positive, "positive")):
            numbers = _is_row(getattr(self, name), allowed, self.in_channels)
            self._require(name, numbers, f"{self.in_channels} {what} numbers, as many as in_channels")
        named = self.class_names is None or _is_row(self.class_names, _is_text, self.num_classes)
        self._require("class_names", named, f"None, or {self.num_classes} strings, as many as num_classes")

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object) -> "Description":
        """The description that :meth:`as_dict` gave ``content``, after its way through JSON.

        Raises:
            InputError: if it gave no such thing.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise InputError(f"its description must be an object of {', '.join(sorted(names))}")
        return cls(**content)

    def _one_of(self, name: str, allowed: tuple[object, ...]) -> None:
        value = getattr(self, name)
        # Types too: of what JSON holds, 1 equals True, and a list cannot even be looked up.
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


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _is_text(value: object) -> bool:
    return isinstance(value, str)
