"""The families of 1-bit networks, by the names that checkpoints, packed files and the command line know them by.

A new family is one line here or, outside this package, one call of :func:`register_family`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pcnn_lightning import layers


class Family(NamedTuple):
    """What belongs to a family.

    Attributes:
        module: the import path of its LightningModule.
        layer: its 1-bit convolution, which also makes the inference layers of a packed file.
    """

    module: str
    layer: type[layers.QuantizedConv2d]


FAMILIES: dict[str, Family] = {}


def register_family(name: str, module: str, layer: type[layers.QuantizedConv2d]) -> None:
    """Make a family known to packed files and the command line.

    Args:
        name: the ``family`` of the LightningModule.
        module: the import path of the LightningModule, such as ``"my_package.MyNetwork"``.
        layer: the 1-bit convolution of its networks.
    """
    FAMILIES[name] = Family(module, layer)


def module_of(record: Mapping[str, Any]) -> Any:
    """The import path of the LightningModule that wrote a checkpoint, from its record of the run, ``one_bit``."""
    class_path, family = record.get("class_path"), FAMILIES.get(record.get("family", ""))
    if family is not None and str(class_path).rpartition(".")[2] == family.module.rpartition(".")[2]:
        return family.module  # where it is now, should the class have moved since
    return class_path


register_family("PCNN", "pcnn_lightning.modules.PCNN", layers.ProjectionConv2d)
register_family("MCN", "pcnn_lightning.modules.MCN", layers.ModulatedConv2d)
register_family("BNN", "pcnn_lightning.modules.BNN", layers.BinaryConv2d)
