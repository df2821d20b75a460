"""LightningModules, one for each family of networks."""

from pcnn_lightning.modules.classifier import OneBitClassifier
from pcnn_lightning.modules.mcn import MCN
from pcnn_lightning.modules.packed import PackedClassifier, describe
from pcnn_lightning.modules.pcnn import PCNN

__all__ = ["MCN", "PCNN", "OneBitClassifier", "PackedClassifier", "describe"]
