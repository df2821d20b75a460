"""LightningModules, one for each family of networks."""

from pcnn_lightning.modules.bnn import BNN as BNN
from pcnn_lightning.modules.classifier import OneBitClassifier as OneBitClassifier
from pcnn_lightning.modules.mcn import MCN as MCN
from pcnn_lightning.modules.packed import PackedClassifier as PackedClassifier
from pcnn_lightning.modules.packed import describe as describe
from pcnn_lightning.modules.pcnn import PCNN as PCNN
from pcnn_lightning.modules.second_rate import TwoRateClassifier as TwoRateClassifier
