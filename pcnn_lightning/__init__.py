"""Train 1-bit convolutional networks in PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pcnn_lightning.version import __version__ as __version__

if TYPE_CHECKING:
    from pcnn_lightning.callbacks import *
    from pcnn_lightning.data import *
    from pcnn_lightning.layers import *
    from pcnn_lightning.losses import *
    from pcnn_lightning.modules import *

_PACKAGES = ("layers", "losses", "data", "modules", "callbacks")
"""Packages whose classes are also found here."""


def __getattr__(name: str) -> Any:
    # Imported when first asked for, so that a user of the layers does not wait for Lightning to be imported.
    if name[0].isupper():
        for package in _PACKAGES:
            module = import_module(f"{__name__}.{package}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
