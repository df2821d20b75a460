"""LightningModules: the loop, and the families of 1-bit networks that it trains."""

from pcnn_lightning.modules.classifier import OneBitClassifier
from pcnn_lightning.modules.pcnn import PCNN

__all__ = ["PCNN", "OneBitClassifier"]
