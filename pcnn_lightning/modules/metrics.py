"""What is measured while a network is trained."""

import torch
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """Mean over samples of a value known by batches, which, unlike torchmetrics' own, never waits for the device."""

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
