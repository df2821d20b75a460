"""Benchmarks: training and inference against the full-precision twin, and a layer against other libraries."""

from pcnn_lightning.reports.benchmark.inference import benchmark_inference
from pcnn_lightning.reports.benchmark.layer import benchmark_layer
from pcnn_lightning.reports.benchmark.measure import Report, Setting
from pcnn_lightning.reports.benchmark.training import benchmark_training, loader_rate

__all__ = ["Report", "Setting", "benchmark_inference", "benchmark_layer", "benchmark_training", "loader_rate"]
