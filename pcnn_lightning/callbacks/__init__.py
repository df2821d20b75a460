"""Callbacks: when a run changes its stage, and what it records."""

from pcnn_lightning.callbacks.loss_curves import LossCurves
from pcnn_lightning.callbacks.prediction_writer import PredictionWriter
from pcnn_lightning.callbacks.progress import StageProgressBar
from pcnn_lightning.callbacks.stage_checkpoint import StageCheckpoint
from pcnn_lightning.callbacks.stage_switch import StageSwitch

__all__ = ["LossCurves", "PredictionWriter", "StageCheckpoint", "StageProgressBar", "StageSwitch"]
