"""Callbacks: when a run changes its stage, and what it records, draws and keeps."""

from pcnn_lightning.callbacks.diversity import Diversity
from pcnn_lightning.callbacks.filter_curves import FilterCurves
from pcnn_lightning.callbacks.flip_ratio import FlipRatio
from pcnn_lightning.callbacks.gradient_norms import GradientNorms
from pcnn_lightning.callbacks.kernel_histograms import KernelHistograms
from pcnn_lightning.callbacks.loss_curves import LossCurves
from pcnn_lightning.callbacks.prediction_writer import PredictionWriter
from pcnn_lightning.callbacks.progress import StageProgressBar
from pcnn_lightning.callbacks.stage_checkpoint import StageCheckpoint
from pcnn_lightning.callbacks.stage_switch import StageSwitch

__all__ = [
    "Diversity",
    "FilterCurves",
    "FlipRatio",
    "GradientNorms",
    "KernelHistograms",
    "LossCurves",
    "PredictionWriter",
    "StageCheckpoint",
    "StageProgressBar",
    "StageSwitch",
]
