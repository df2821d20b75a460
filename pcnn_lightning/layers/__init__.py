"""Layers of 1-bit networks: thin modules over :mod:`pcnn_lightning.functional`, usable in any training loop."""

from pcnn_lightning.layers.activation import SignActivation as SignActivation
from pcnn_lightning.layers.batch_norm import FrozenBatchNorm2d as FrozenBatchNorm2d
from pcnn_lightning.layers.binary import BinaryConv2d as BinaryConv2d
from pcnn_lightning.layers.convolution import FrozenConv2d as FrozenConv2d
from pcnn_lightning.layers.convolution import QuantizedConv2d as QuantizedConv2d
from pcnn_lightning.layers.convolution import Storage as Storage
from pcnn_lightning.layers.convolution import one_bit_layers as one_bit_layers
from pcnn_lightning.layers.modulated import FrozenModulatedConv2d as FrozenModulatedConv2d
from pcnn_lightning.layers.modulated import ModulatedConv2d as ModulatedConv2d
from pcnn_lightning.layers.prelu import TwoSlopePReLU as TwoSlopePReLU
from pcnn_lightning.layers.projection import ProjectionConv2d as ProjectionConv2d
