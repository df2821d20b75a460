"""Means over an epoch of training."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


class SampleMean(Metric):
    """Mean of a value over samples; unlike torchmetrics' own it does not check values, which waits for the device."""

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: Tensor, samples: int) -> None:
        self.total += value * samples
        self.samples += samples

    def compute(self) -> Tensor:
        return self.total / self.samples


def accuracy(num_classes: int) -> MulticlassAccuracy:
    """Share of samples with the right label."""
    # Checking its arguments would wait for the device in every batch.
    return MulticlassAccuracy(num_classes, average="micro", validate_args=False)


def accuracies(num_classes: int) -> MetricCollection:
    """The metrics of an evaluation: ``accuracy`` and, of more than 20 classes, ``accuracy_top5``.

    The latter is the share of samples whose label is among the five with the largest logits.
    """
    found: dict[str, Metric | MetricCollection] = {"accuracy": accuracy(num_classes)}
    if num_classes > 20:
        found["accuracy_top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro", validate_args=False)
    return MetricCollection(found, compute_groups=False)


class EpochMeans(nn.ModuleDict):
    """Losses and accuracy over an epoch of training.

    They are kept here rather than by Lightning, so that a checkpoint within an epoch can hold them.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__({"loss": SampleMean(), "accuracy": accuracy(num_classes)})

    def add(self, losses: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            losses: scalars by name.
            logits: (B, num_classes).
            labels: (B,), or their probabilities (B, num_classes), of which accuracy takes the most likely one.
        """
        if labels.is_floating_point():
            labels = labels.argmax(dim=1)
        for name, mean in self._metrics():
            if name == "accuracy":
                mean.update(logits, labels)
            elif name in losses:
                mean.update(losses[name], len(labels))

    def reset(self) -> None:
        """Begin an epoch."""
        for _, mean in self._metrics():
            mean.reset()

    def held(self) -> dict[str, Metric]:
        """The means of at least one batch, by name."""
        return {name: mean for name, mean in self._metrics() if mean.update_called}

    def sums(self, strategy: Strategy) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps of them, summed over all processes."""
        return {
            name: {
                part: strategy.reduce(value.clone(), reduce_op="sum")
                for part, value in mean.metric_state.items()
                if isinstance(value, Tensor)
            }
            for name, mean in self.held().items()
        }

    def restore(self, sums: dict[str, dict[str, Tensor]], first_process: bool) -> None:
        """Take up :meth:`sums` again, in the first process only."""
        means = dict(self._metrics())
        for name in sums.keys() & means.keys():  # a module that only tests may lack a term
            mean, state = means[name], sums[name]
            for part, value in state.items():
                setattr(mean, part, value.to(mean.device) * first_process)
            mean._update_count = 1  # a metric without updates counts as empty

    def _metrics(self) -> Iterator[tuple[str, Metric]]:
        return ((name, mean) for name, mean in self.items() if isinstance(mean, Metric))
