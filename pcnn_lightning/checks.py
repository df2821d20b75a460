"""Checks of arguments; errors name the argument, its value and what is allowed."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float; true and false are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Require an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, but got {value!r}")


def check_number(name: str, value: Any, minimum: float, below: float = math.inf) -> None:
    """Require a number of at least ``minimum`` and below ``below``; NaN is none."""
    if not is_number(value) or not minimum <= value < below:
        allowed = f"a number of at least {minimum:g}" if below == math.inf else f"a number in [{minimum:g}, {below:g})"
        raise ValueError(f"{name} must be {allowed}, but got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Require a number from 0 to 1, both included."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], but got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Require a finite number above zero."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, but got {value!r}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Require one of the ``allowed`` strings."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}")


def check_bool(name: str, value: Any) -> None:
    """Require true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, but got {value!r}")


def check_path(name: str, value: Any) -> None:
    """Require a string or a path object."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name} must be a path, but got {value!r}")


def check_given(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Require values of the types in the annotations of ``function``: booleans, strings, lists and None.

    Numbers and choices have checks of their own.
    """
    for name, hint in get_type_hints(function).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if name in values and not any(_may_be(values[name], kind) for kind in kinds):
            wanted = getattr(hint, "__name__", None) if not get_args(hint) else str(hint).replace("typing.", "")
            raise ValueError(f"{name} must be {wanted}, but got {values[name]!r}")


def _may_be(value: Any, kind: Any) -> bool:
    kind = get_origin(kind) or kind
    if kind in (list, tuple, Sequence):
        return isinstance(value, (list, tuple))
    if kind in (bool, str, NoneType):
        return isinstance(value, kind)
    return value is not None or kind is Any


def pair_of(name: str, value: int | tuple[int, int], minimum: int) -> tuple[int, int]:
    """Return ``value`` as a pair of integers of at least ``minimum``."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(type(item) is int and item >= minimum for item in pair):
        raise ValueError(f"{name} must be an integer of at least {minimum} or a pair of them, but got {value!r}")
    return (pair[0], pair[1])
