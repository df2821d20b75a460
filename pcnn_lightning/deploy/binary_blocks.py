"""Frozen blocks as the numbers that :mod:`pcnn_lightning.deploy.xnor` takes, and the layer that runs them.

All of it is exact: sums of signs are whole numbers, and floats are rounded where torch rounds them.
"""

import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pcnn_lightning.backbones import OneBitBlock
from pcnn_lightning.deploy.layers import FrozenBatchNorm2d, FrozenProjectionConv2d

# Of numba's threading layers, the one that is always there ends the process when two threads enter it at once.
_ONE_AT_A_TIME = threading.Lock()
_CACHE = 2**18  # bytes of a thread's images at work, which are a part of all that it touches


class BinaryBlocks(nn.Module):
    """Blocks in a row, of one shape if they are several, in the place of as many frozen ``OneBitBlock``.

    Args:
        blocks: blocks of binary 3×3 convolutions. The first may have any shortcut, stride, padding and pool; if it is
            not the last, all keep the shape of their input and add it.
    """

    def __init__(self, blocks: Sequence[OneBitBlock]) -> None:
        super().__init__()
        first, convolutions = blocks[0], [cast(FrozenProjectionConv2d, block.conv) for block in blocks]
        self.in_channels, self.out_channels = convolutions[0].in_channels, convolutions[0].out_channels
        self.stride, self.padding = convolutions[0].stride[0], cast(tuple[int, int], convolutions[0].padding)[0]
        self.shortcut, shortcut_norm, self.shortcut_pool = _split(first.shortcut, self.out_channels)
        self.shortcut_norm = torch.stack([shortcut_norm.scale, shortcut_norm.shift]).numpy()
        # Maxima are taken before the PReLU, which may fall.
        self.pool, self.prelu = first.pool, first.prelu if first.pool is not None else None
        slopes = [torch.ones(self.out_channels) if self.pool is not None else block.prelu.weight for block in blocks]
        self.slopes = torch.stack(slopes).detach().numpy()
        self.scales = torch.stack([convolution.scale for convolution in convolutions]).numpy()
        prepared = [_prepare(block) for block in blocks]
        self.thresholds, self.weights, self.tap_bits = (np.stack(parts) for parts in zip(*prepared, strict=True))
        self.fused = _torch_fuses()
        self._border: tuple[torch.Size, tuple[Any, Any, Any]] | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What the blocks make of ``x`` (B, in_channels, H, W).

        Raises:
            ValueError: if ``x`` is no float32 on the CPU, or of another shape.
        """
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"an accelerated network must run in float32 on the CPU, but got {x.dtype} on {x.device}")
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"images must be of shape (B, {self.in_channels}, H, W), but got {tuple(x.shape)}")
        rows, columns, base = self._border_of(x.shape[2:])
        images = x.contiguous()
        output = torch.empty(len(x), self.out_channels, len(rows), len(columns))
        if self.shortcut is None:
            shortcuts = torch.empty(0, self.out_channels, 1, 1)
        else:
            shortcuts = images if isinstance(self.shortcut, nn.Identity) else self.shortcut(x).contiguous()
            sides = (-(-side // self.shortcut_pool) for side in shortcuts.shape[2:])
            if (shape := (*shortcuts.shape[:2], *sides)) != output.shape:
                raise ValueError(f"a shortcut to {shape} cannot be added to a convolution to {tuple(output.shape)}")
        self._run(images, shortcuts, output, rows, columns, base)
        # In the layout that torch would have left, so that what follows rounds as it would have done.
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
        # As many images of a thread as its cache holds: each round of the threads costs a microsecond.
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
            if torch.get_num_threads() != of_torch:  # numba's first launch sets them to all there are
                torch.set_num_threads(of_torch)

    def _border_of(self, size: torch.Size) -> tuple[Any, Any, Any]:
        """What ``run_blocks`` takes as rows, columns and base for images of (H, W), kept for the next ones."""
        if self._border is None or self._border[0] != size:
            (rows, row_taps), (columns, column_taps) = (_taps(side, self.stride, self.padding) for side in size)
            inside = row_taps[:, None, :, None] & column_taps[None, :, None, :]
            # A tap inside brings C - 2 * popcount. One outside brings -2 * popcount, but should bring nothing.
            outside = np.einsum("rcyx,nyxo->nrco", ~inside, self.tap_bits, dtype=np.int64)
            base = self.in_channels * inside.sum((2, 3))[:, :, None] + 2 * outside
            self._border = size, (rows, columns, np.ascontiguousarray(base, np.float32))
        return self._border[1]


def _taps(side: int, stride: int, padding: int) -> tuple[Any, Any]:
    """Which kind each position along a side of the output is, and which taps lie inside for each kind, (kinds, 3)."""
    count = (side + 2 * padding - 3) // stride + 1
    if count < 1:
        raise ValueError(f"a side of images must be at least {3 - 2 * padding} pixels, but is {side}")
    places = np.arange(count)[:, None] * stride - padding + np.arange(3)
    taps, kinds = np.unique((places >= 0) & (places < side), axis=0, return_inverse=True)
    return kinds.reshape(-1), taps


def _prepare(block: OneBitBlock) -> tuple[Any, Any, Any]:
    """Thresholds (words * 64,), weights (words, 9, O) and the number of ones in each tap of them, (3, 3, O)."""
    thresholds, falls = _thresholds(cast(FrozenBatchNorm2d, block.norm))
    signs = cast(FrozenProjectionConv2d, block.conv).signs
    bits = ((signs > 0) ^ falls[:, None, None]).permute(2, 3, 0, 1).numpy()  # (3, 3, O, C)
    fill = -bits.shape[-1] % 64
    octets = np.packbits(np.pad(bits, [(0, 0)] * 3 + [(0, fill)]), axis=-1, bitorder="little")
    words = octets.view(np.uint64).reshape(9, bits.shape[2], -1).transpose(2, 0, 1)
    # What fills up a word is 0 in images, which never reaches infinity: its bit is 0 in both.
    filled = np.pad(thresholds.numpy(), (0, fill), constant_values=np.inf)
    return filled, np.ascontiguousarray(words), bits.sum(-1)


def _thresholds(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """The least number of each channel that has another sign than those below it, and whether the sign falls there.

    ``norm(x) >= 0`` is ``(x >= threshold) != falls``. However torch rounds, it keeps the order of numbers, so that
    bisection over all floats finds the threshold.
    """
    falls = norm.scale < 0
    infinity = 0x7F800000  # Floats of one sign are in the order of their bits, read as integers.
    low, high = (torch.full_like(falls, end, dtype=torch.int64) for end in (-infinity, infinity))
    for _ in range(33):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = (norm(_as_float(middle)[:, None, None])[:, 0, 0] >= 0) ^ falls
        low, high = torch.where(reached, low, torch.minimum(middle + 1, high)), torch.where(reached, middle, high)
    return _as_float(high), falls


def _as_float(order: Tensor) -> Tensor:
    return order.abs().to(torch.int32).view(torch.float32) * order.sign()


def _torch_fuses() -> bool:
    """Whether torch rounds the product and the sum of a batch norm as one, as it does where the processor can."""
    norm = FrozenBatchNorm2d(1)
    norm.scale.fill_(1 + 2**-12)
    norm.shift.fill_(-1 - 2**-11)
    return bool((norm(torch.full((1, 1, 8, 8), 1 + 2**-12)) != 0).all())


def _split(shortcut: nn.Module | None, channels: int) -> tuple[nn.Module | None, FrozenBatchNorm2d, int]:
    """What torch makes of a shortcut, and the norm and the size of the average pool that the kernel makes of it."""
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
    return shortcut, FrozenBatchNorm2d(channels), 1
