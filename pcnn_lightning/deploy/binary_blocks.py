"""Converts frozen blocks to the arrays that :mod:`pcnn_lightning.deploy.xnor` takes, and runs them as a layer.

All results are exact: sums of signs are integers, and floats are rounded where torch rounds them.
"""

import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pcnn_lightning.backbones import OneBitBlock
from pcnn_lightning.layers import FrozenBatchNorm2d, FrozenConv2d

# Numba's only threading layer that is always available aborts the process if two threads enter it at once.
_ONE_AT_A_TIME = threading.Lock()
_CACHE = 2**18  # bytes of the images that a thread works on, a part of its working set


class BinaryBlocks(nn.Module):
    """Runs consecutive frozen ``OneBitBlock`` modules; if there are several, they have one shape.

    Args:
        blocks: blocks with binary 3×3 convolutions. A single block may have any shortcut, stride, padding and pool;
            several blocks must keep the shape of their input and add it.
    """

    def __init__(self, blocks: Sequence[OneBitBlock]) -> None:
        super().__init__()
        first, convolutions = blocks[0], [cast(FrozenConv2d, block.conv) for block in blocks]
        self.in_channels, self.out_channels = convolutions[0].in_channels, convolutions[0].out_channels
        self.stride, self.padding = convolutions[0].stride[0], cast(tuple[int, int], convolutions[0].padding)[0]
        self.shortcut, shortcut_norm, self.shortcut_pool = _split(first.shortcut, self.out_channels)
        self.shortcut_norm = torch.stack([shortcut_norm.scale, shortcut_norm.shift]).numpy()
        # Max pooling precedes the PReLU, which may be decreasing.
        self.pool, self.prelu = first.pool, first.prelu if first.pool is not None else None
        ones = torch.ones(self.out_channels, dtype=torch.float32)
        slopes = [ones if self.pool is not None else block.prelu.weight for block in blocks]
        self.slopes = torch.stack(slopes).detach().numpy()
        self.scales = torch.stack([_scales(convolution) for convolution in convolutions]).numpy()
        prepared = [_prepare(block) for block in blocks]
        self.thresholds, self.weights, self.tap_bits = (np.stack(parts) for parts in zip(*prepared, strict=True))
        self.fused = _torch_fuses()
        self._border: tuple[torch.Size, tuple[Any, Any, Any]] | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks on ``x`` (B, in_channels, H, W).

        Raises:
            ValueError: if ``x`` is not float32 on the CPU, or its shape does not fit.
        """
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"an accelerated network must run in float32 on the CPU, but got {x.dtype} on {x.device}")
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"images must be of shape (B, {self.in_channels}, H, W), but got {tuple(x.shape)}")
        rows, columns, base = self._border_of(x.shape[2:])
        images = x.contiguous()
        output = x.new_empty(len(x), self.out_channels, len(rows), len(columns))
        if self.shortcut is None:
            shortcuts = x.new_empty(0, self.out_channels, 1, 1)
        else:
            shortcuts = images if isinstance(self.shortcut, nn.Identity) else self.shortcut(x).contiguous()
            sides = (-(-side // self.shortcut_pool) for side in shortcuts.shape[2:])
            if (shape := (*shortcuts.shape[:2], *sides)) != output.shape:
                raise ValueError(f"a shortcut to {shape} cannot be added to a convolution to {tuple(output.shape)}")
        self._run(images, shortcuts, output, rows, columns, base)
        # Return the memory layout that torch would, so that later layers round as they would in torch.
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            output = output.contiguous(memory_format=torch.channels_last)
        if self.pool is not None and self.prelu is not None:
            output = self.prelu(self.pool(output))
        return output

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, blocks={len(self.scales)}, stride={self.stride}"

    def _run(self, images: Tensor, shortcuts: Tensor, output: Tensor, rows: Any, columns: Any, base: Any) -> None:
        import numba

        from pcnn_lightning.deploy.xnor import run_blocks

        of_torch, before = torch.get_num_threads(), numba.get_num_threads()
        threads = min(of_torch, numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(threads)
        # As many images per thread as fit into its cache: each launch of the threads costs a microsecond.
        at_once = min(threads * max(1, _CACHE // (4 * output.shape[1:].numel())), max(1, len(output)))
        try:
            with _ONE_AT_A_TIME:
                run_blocks(
                    images.numpy(),
                    shortcuts.numpy(),
                    self.shortcut_norm,
                    self.shortcut_pool,
                    self.fused,
                    output.numpy(),
                    at_once,
                    self.stride,
                    self.padding,
                    self.thresholds,
                    self.weights,
                    base,
                    rows,
                    columns,
                    self.scales,
                    self.slopes,
                )
        finally:
            numba.set_num_threads(before)
            if torch.get_num_threads() != of_torch:  # numba's first launch resets it to all threads
                torch.set_num_threads(of_torch)

    def _border_of(self, size: torch.Size) -> tuple[Any, Any, Any]:
        """The arguments rows, columns and base of ``run_blocks`` for images of (H, W), cached for the next call."""
        if self._border is None or self._border[0] != size:
            (rows, row_taps), (columns, column_taps) = (_taps(side, self.stride, self.padding) for side in size)
            inside = row_taps[:, None, :, None] & column_taps[None, :, None, :]
            # A tap inside contributes C - 2 * popcount. One outside contributes -2 * popcount, but should be 0.
            outside = np.einsum("rcyx,nyxo->nrco", ~inside, self.tap_bits, dtype=np.int64)
            base = self.in_channels * inside.sum((2, 3))[:, :, None] + 2 * outside
            self._border = size, (rows, columns, np.ascontiguousarray(base, np.float32))
        return self._border[1]


def _taps(side: int, stride: int, padding: int) -> tuple[Any, Any]:
    """Kind of each position along a side of the output, and the taps that lie inside for each kind, (kinds, 3)."""
    count = (side + 2 * padding - 3) // stride + 1
    if count < 1:
        raise ValueError(f"a side of images must be at least {3 - 2 * padding} pixels, but is {side}")
    places = np.arange(count)[:, None] * stride - padding + np.arange(3)
    taps, kinds = np.unique((places >= 0) & (places < side), axis=0, return_inverse=True)
    return kinds.reshape(-1), taps


def _prepare(block: OneBitBlock) -> tuple[Any, Any, Any]:
    """Thresholds (words * 64,), weights (words, 9, O) and the number of ones in each tap of these, (3, 3, O)."""
    thresholds, falls = _thresholds(cast(FrozenBatchNorm2d, block.norm))
    signs = cast(Tensor, block.conv.signs)
    bits = ((signs > 0) ^ falls[:, None, None]).permute(2, 3, 0, 1).numpy()  # (3, 3, O, C)
    fill = -bits.shape[-1] % 64
    octets = np.packbits(np.pad(bits, [(0, 0)] * 3 + [(0, fill)]), axis=-1, bitorder="little")
    words = octets.view(np.uint64).reshape(9, bits.shape[2], -1).transpose(2, 0, 1)
    # Padding channels are 0 in images, below the infinite threshold: their bits are 0 in images and weights.
    filled = np.pad(thresholds.numpy(), (0, fill), constant_values=np.inf)
    return filled, np.ascontiguousarray(words), bits.sum(-1)


def _thresholds(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Smallest float of each channel at which the sign of the norm changes, and whether it falls from + to - there.

    ``norm(x) >= 0`` is ``(x >= threshold) != falls``. However torch rounds, it preserves the order of numbers, so that
    bisection over all floats finds the threshold.
    """
    falls = norm.scale < 0
    infinity = 0x7F800000  # Floats of one sign are ordered like their bits, read as integers.
    low, high = (torch.full_like(falls, end, dtype=torch.int64) for end in (-infinity, infinity))
    for _ in range(33):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = (norm(_as_float(middle)[:, None, None])[:, 0, 0] >= 0) ^ falls
        low, high = torch.where(reached, low, torch.minimum(middle + 1, high)), torch.where(reached, middle, high)
    return _as_float(high), falls


def _as_float(order: Tensor) -> Tensor:
    return order.abs().to(torch.int32).view(torch.float32) * order.sign()


def _torch_fuses() -> bool:
    """Whether torch computes a batch norm by fused multiply-add, as it does where the processor can."""
    norm = FrozenBatchNorm2d(1).float()
    norm.scale.fill_(1 + 2**-12)
    norm.shift.fill_(-1 - 2**-11)
    return bool((norm(torch.full((1, 1, 8, 8), 1 + 2**-12, dtype=torch.float32)) != 0).all())


def _scales(convolution: FrozenConv2d) -> Tensor:
    """Scale of each output channel, (out_channels,)."""
    ones = torch.ones(convolution.out_channels, dtype=torch.float32)
    return ones if convolution.scale is None else ones * convolution.scale.flatten()


def _split(shortcut: nn.Module | None, channels: int) -> tuple[nn.Module | None, FrozenBatchNorm2d, int]:
    """Split a shortcut into what torch computes, and the norm and average-pool size that the kernel applies to it."""
    if isinstance(shortcut, nn.Sequential) and len(shortcut) in (2, 3) and isinstance(shortcut[1], FrozenBatchNorm2d):
        pool = shortcut[2] if len(shortcut) == 3 else nn.AvgPool2d(1, ceil_mode=True, count_include_pad=False)
        if (
            isinstance(pool, nn.AvgPool2d)
            and isinstance(pool.kernel_size, int)
            and (pool.stride, pool.padding, pool.ceil_mode) == (pool.kernel_size, 0, True)
            and not pool.count_include_pad
            and pool.divisor_override is None
        ):
            return shortcut[0], shortcut[1], pool.kernel_size
    return shortcut, FrozenBatchNorm2d(channels).float(), 1
