"""Layers of 1-bit networks: thin modules over :mod:`pcnn_lightning.functional`, usable in any training loop."""

from pcnn_lightning.layers.activation import SignActivation
from pcnn_lightning.layers.convolution import QuantizedConv2d
from pcnn_lightning.layers.modulated import ModulatedConv2d, ModulationInit
from pcnn_lightning.layers.projection import ProjectionConv2d, ProjectionInit

__all__ = [
    "ModulatedConv2d",
    "ModulationInit",
    "ProjectionConv2d",
    "ProjectionInit",
    "QuantizedConv2d",
    "SignActivation",
]
