"""Terms of the training loss."""

from pcnn_lightning.losses.center import CenterLoss as CenterLoss
from pcnn_lightning.losses.distillation import Distillation as Distillation
from pcnn_lightning.losses.term import CrossEntropy as CrossEntropy
from pcnn_lightning.losses.term import LossTerm as LossTerm
from pcnn_lightning.losses.term import Outputs as Outputs
from pcnn_lightning.losses.term import QuantizationLoss as QuantizationLoss
