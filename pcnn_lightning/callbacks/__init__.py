"""Callbacks: plans of stages, checkpoints, and recorders that log and plot a run."""

from pcnn_lightning.callbacks.confusion_matrix import ConfusionMatrix as ConfusionMatrix
from pcnn_lightning.callbacks.diversity import Diversity as Diversity
from pcnn_lightning.callbacks.epoch_lines import EpochLines as EpochLines
from pcnn_lightning.callbacks.filter_curves import FilterCurves as FilterCurves
from pcnn_lightning.callbacks.flip_ratio import FlipRatio as FlipRatio
from pcnn_lightning.callbacks.gradient_norms import GradientNorms as GradientNorms
from pcnn_lightning.callbacks.kernel_histograms import KernelHistograms as KernelHistograms
from pcnn_lightning.callbacks.loss_curves import LossCurves as LossCurves
from pcnn_lightning.callbacks.prediction_writer import PredictionWriter as PredictionWriter
from pcnn_lightning.callbacks.progress import StageProgressBar as StageProgressBar
from pcnn_lightning.callbacks.stage_checkpoint import StageCheckpoint as StageCheckpoint
from pcnn_lightning.callbacks.stage_plan import StagePlan as StagePlan
from pcnn_lightning.callbacks.stage_plan import StageSwitch as StageSwitch
