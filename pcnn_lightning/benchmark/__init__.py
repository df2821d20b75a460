"""How long things take: training steps beside those of the full-precision twin, a layer and inference beside peers."""

from pcnn_lightning.benchmark.inference import benchmark_inference
from pcnn_lightning.benchmark.layer import benchmark_layer
from pcnn_lightning.benchmark.measure import Report, Setting
from pcnn_lightning.benchmark.training import benchmark_training, loader_rate

__all__ = ["Report", "Setting", "benchmark_inference", "benchmark_layer", "benchmark_training", "loader_rate"]
