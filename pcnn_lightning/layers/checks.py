"""Checks of layer arguments; errors name the argument, its value and what is allowed."""

import math
from collections.abc import Sequence


def pair_of(name: str, value: int | tuple[int, int], minimum: int) -> tuple[int, int]:
    """Return ``value`` as a pair of integers of at least ``minimum``."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(item, int) and item >= minimum for item in pair):
        raise ValueError(f"{name} must be an integer of at least {minimum} or a pair of them, but got {value!r}")
    return (pair[0], pair[1])


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Require a finite number of at least ``minimum``."""
    if not isinstance(value, (int, float)) or not minimum <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least {minimum}, but got {value!r}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Require one of the ``allowed`` strings."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}")
