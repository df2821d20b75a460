"""A second implementation of PCNN and MCN: float64, slow, plane by plane, and independent of the package.

Written from the equations of the method (3.12-3.27, 3.42-3.59), so that the tests compare two independent readings of
them.
"""

import datetime
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

torch.set_num_threads(1)  # tensors this small gain nothing from threads that wait for each other on a busy machine

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def sign(x: Tensor) -> Tensor:
    """The sign of each element, +1 for zero."""
    signs = torch.ones_like(x)
    signs[x < 0] = -1
    return signs


def quantize(
    weight: Tensor, projection: Tensor, *, levels: int = 2, sigma: float = 0.7, projection_forward: str = "full"
) -> Tensor:
    """D of shape (O * J, in, kh, kw), kernel by kernel: ``D[o * J + j] = Ĉ_j[o]`` (3.28, 3.57-3.59)."""
    weight, projection = weight.detach().double(), projection.detach().double()
    originals, matrices = len(weight), len(projection)
    scale = weight.abs().mean()
    quantized = torch.empty(originals * matrices, *weight.shape[1:], dtype=torch.float64)
    for o, j in itertools.product(range(originals), range(matrices)):
        matrix = projection[j].mean() if projection_forward == "mean" else projection[j]
        product = matrix * weight[o]
        if levels == 2:
            kernel = scale * sign(product)
        else:
            kernel = sigma * scale * sign(product)
            kernel[product.abs() <= sigma * scale] = 0
        quantized[o * matrices + j] = kernel
    return quantized


def normalize(weight: Tensor, normalization: str) -> Tensor:
    """C with the mean of each filter subtracted, and its deviation made √(2 / n); autograd can differentiate it."""
    filters = []
    for kernel in weight:
        centered = kernel - kernel.sum() / kernel.numel() if normalization != "none" else kernel
        variance = centered.square().sum() / kernel.numel()
        deviation = math.sqrt(2 / kernel.numel())
        filters.append(centered * deviation / variance.sqrt() if normalization == "standardize" else centered)
    return torch.stack(filters)


def projection_loss(weight: Tensor, projection: Tensor, quantized: Tensor, loss_weight: float) -> float:
    """λ/2 Σ_j ‖Ĉ_j - W̃_j ∘ C‖² (3.42 with η = 0), summed one kernel at a time."""
    weight, projection = weight.detach().double(), projection.detach().double()
    total, matrices = 0.0, len(projection)
    for o, j in itertools.product(range(len(weight)), range(matrices)):
        total += (quantized[o * matrices + j] - projection[j] * weight[o]).square().sum().item()
    return loss_weight / 2 * total


def gradients(
    weight: Tensor, projection: Tensor, quantized: Tensor, delta: Tensor, *, loss_weight: float, eta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """∂L/∂C (3.49) and ∂L/∂W (3.53) from D and δ, the task loss's gradient by D, both (O * J, in, kh, kw)."""
    weight, projection = weight.detach().double(), projection.detach().double()
    by_weight, by_projection = torch.zeros_like(weight), torch.zeros_like(projection)
    matrices = len(projection)
    for j in range(matrices):
        delta_j, quantized_j = delta[j::matrices], quantized[j::matrices]
        ahead = weight + eta * delta_j
        residual = projection[j] * ahead - quantized_j
        indicator = ((projection[j] * weight).abs() <= 1).double()
        by_weight += delta_j * indicator * projection[j] + loss_weight * residual * projection[j]
        by_projection[j] = (delta_j * indicator * weight + loss_weight * residual * ahead).sum(dim=(0, 1))
    return by_weight, by_projection


def quantize_by_levels(
    weight: Tensor, *, scale: float | None = None, centers: Tensor | None = None, binarize: bool = True
) -> Tensor:
    """Ĉ of MCN: a · sign(C), each element's nearest centre, or C itself (U-MCN)."""
    weight = weight.detach().double()
    if not binarize:
        return weight.clone()
    if centers is not None:
        distances = torch.stack([(weight - center).abs() for center in centers.double().tolist()])
        return centers.double()[distances.argmin(0)]
    return (weight.abs().mean().item() if scale is None else scale) * sign(weight)


def modulating_planes(modulation: Tensor, average: bool = False) -> list[Tensor]:
    """|M_k|, or a plane of its mean (MCN-1), for each k."""
    planes = [plane.abs() for plane in modulation.detach().double()]
    return [torch.full_like(plane, plane.mean().item()) for plane in planes] if average else planes


def modulate(quantized: Tensor, modulation: Tensor, average: bool = False) -> Tensor:
    """Q of shape (O * K, in, kh, kw), kernel by kernel: ``Q[h * K + k] = Ĉ[h] ∘ |M_k|`` (3.12-3.17)."""
    planes = modulating_planes(modulation, average)
    modulated = torch.empty(len(quantized) * len(planes), *quantized.shape[1:], dtype=torch.float64)
    for h, k, c in itertools.product(range(len(quantized)), range(len(planes)), range(quantized.shape[1])):
        modulated[h * len(planes) + k, c] = quantized[h, c] * planes[k]
    return modulated


def filter_loss(
    weight: Tensor, modulation: Tensor, quantized: Tensor, loss_weight: float, average: bool = False
) -> float:
    """θ/2 Σ_k ‖C - Ĉ ∘ |M_k|‖² (3.18), summed one kernel at a time."""
    weight, total = weight.detach().double(), 0.0
    for plane, h in itertools.product(modulating_planes(modulation, average), range(len(weight))):
        total += (weight[h] - quantized[h] * plane).square().sum().item()
    return loss_weight / 2 * total


def modulation_gradients(
    weight: Tensor, modulation: Tensor, quantized: Tensor, delta: Tensor, *, loss_weight: float, average: bool = False
) -> tuple[Tensor, Tensor]:
    """∂L/∂C (3.20) and ∂L/∂M (3.24) from Ĉ and δ, the task loss's gradient by Q, (O * K, in, kh, kw).

    3.24 is the gradient of |M_k|; that of M_k is it times M_k's sign. With the mean of |M_k| in its place, each of its
    elements has an equal share in that mean.
    """
    weight, planes = weight.detach().double(), modulating_planes(modulation, average)
    by_weight, by_modulation = torch.zeros_like(weight), torch.zeros_like(modulation, dtype=torch.float64)
    for h, k, c in itertools.product(range(len(weight)), range(len(planes)), range(weight.shape[1])):
        delta_k = delta[h * len(planes) + k, c]
        residual = weight[h, c] - quantized[h, c] * planes[k]
        by_weight[h, c] += delta_k * planes[k] + loss_weight * residual
        by_modulation[k] += delta_k * quantized[h, c] - loss_weight * residual * quantized[h, c]
    if average:
        for k in range(len(planes)):
            by_modulation[k] = by_modulation[k].sum() / by_modulation[k].numel()
    return by_weight, by_modulation * sign(modulation.detach().double())


def convolve(x: Tensor, kernels: Tensor, bias: Tensor | None = None, *, groups: int = 1, **convolution: Any) -> Tensor:
    """conv2d, one group after another: each group of kernels with its own input channels."""
    parts = zip(x.chunk(groups, dim=1), kernels.chunk(groups), strict=True)
    y = torch.cat([F.conv2d(channels, own, **convolution) for channels, own in parts], dim=1)
    return y if bias is None else torch.stack([y[:, c] + bias[c] for c in range(len(bias))], dim=1)


def task_gradient(task: Callable[[Tensor], Tensor], x: Tensor, quantized: Tensor, **convolution: Any) -> Tensor:
    """δ: the gradient of ``task(conv2d(x, D))`` by D (or Q), by autograd through ordinary convolutions."""
    leaf = quantized.clone().requires_grad_()
    (delta,) = torch.autograd.grad(task(convolve(x.detach().double(), leaf, **convolution)), leaf)
    return delta


def on_two_processes(
    worker: Callable[..., dict[str, Tensor]], folder: Path, *arguments: object
) -> list[dict[str, Tensor]]:
    """What ``worker(rank, *arguments)`` returns on each of two processes joined by gloo."""
    torch.multiprocessing.spawn(_join, args=(worker, str(folder), arguments), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _join(rank: int, worker: Callable[..., dict[str, Tensor]], folder: str, arguments: tuple[object, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=1),
    )
    try:
        torch.save(worker(rank, *arguments), Path(folder) / f"rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
