"""Cost of a network: parameters, memory and multiply-accumulates per layer.

Parameters are counted as stored for inference. A 1-bit layer reports how many it stores at 1, 2 and 32 bits
(``QuantizedConv2d.storage``); a batch norm folds into a scale and a shift per channel; everything else is stored at 32
bits.

Training memory counts parameters and buffers, including the running statistics of batch norms, at 32 bits each;
gradients, optimizer state, activations and the centers of the center loss are not counted. 1 kB is 1000 bytes.

A multiply-accumulate (MAC) is 1-bit where a layer with sign kernels convolves signs, and 32-bit otherwise. MACs of
convolutions and linear layers are counted for one image, including zero padding; norms, activations and pools have
none. Operations are counted as in XNOR-Net and Bi-Real Net: 32-bit MACs plus 1-bit MACs / 64, the bits of a machine
word. The same holds for ternary kernels: they need one AND more than an XNOR, but no second popcount.

Compression compares the bits at inference with those of the full-precision twin: the same network with ordinary
convolutions in place of the 1-bit ones. ResNet-18 with J = 1 and 1000 classes has the published 33.6 and 374.2 Mbit:
10,985,472 bits and, at 32 bits each, 694,440 weights of stem, shortcuts and classifier, 8,704 values of batch norms,
3,904 of PReLUs and 16 scales.
"""

import copy
import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import chain, takewhile, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from pcnn_lightning.layers import QuantizedConv2d, SignActivation
from pcnn_lightning.tables import filled, terminal_width, text_table

Multiplier = nn.Conv2d | nn.Linear | QuantizedConv2d
"""Layers with multiply-accumulates: ``weight[0].numel()`` for each element of the output."""

HEADERS = {
    "layer": "layer",
    "output_shape": "output",
    "parameters_1bit": "param\n1-bit",
    "parameters_2bit": "param\n2-bit",
    "parameters_32bit": "param\n32-bit",
    "training_bytes": "bytes\ntrain",
    "inference_bytes": "bytes\ninfer",
    "macs_1bit": "MACs\n1-bit",
    "macs_32bit": "MACs\n32-bit",
}
"""Columns of the table."""
WIDEST = 1000
"""Wider than any table."""


@dataclass(frozen=True)
class LayerSummary:
    """A row of the summary: a convolution or linear layer, all other modules of one type, or the total.

    Attributes:
        layer: path of the module in the network, or the number and type of modules.
        kind: type of the module; empty for the total.
        output_shape: (C, H, W) or (C,), without the batch; empty for several modules.
        parameters_1bit: parameters stored at 1 bit at inference.
        parameters_2bit: parameters stored at 2 bits at inference.
        parameters_32bit: parameters stored at 32 bits at inference.
        parameters_twin: parameters of the full-precision twin at inference, at 32 bits.
        values_training: parameters and buffers in training, at 32 bits.
        macs_1bit: 1-bit multiply-accumulates per image.
        macs_32bit: 32-bit multiply-accumulates per image.
    """

    layer: str
    kind: str
    output_shape: tuple[int, ...]
    parameters_1bit: int
    parameters_2bit: int
    parameters_32bit: int
    parameters_twin: int
    values_training: int
    macs_1bit: int
    macs_32bit: int

    @property
    def bits(self) -> int:
        """Memory at inference, in bits."""
        return self.parameters_1bit + 2 * self.parameters_2bit + 32 * self.parameters_32bit

    @property
    def operations(self) -> float:
        """32-bit MACs plus 1-bit MACs / 64."""
        return self.macs_32bit + self.macs_1bit / 64

    def as_dict(self) -> dict[str, Any]:
        """Return the columns of CSV and JSON files."""
        content = asdict(self)
        del content["parameters_twin"], content["values_training"]
        memory = {"training_kB": self.values_training * 4 / 1000, "inference_kB": self.bits / 8000}
        return content | {"output_shape": _times(self.output_shape)} | memory | {"operations": self.operations}

    def counts(self) -> dict[str, Any]:
        """Return the columns of the table."""
        memory = {"training_bytes": 4 * self.values_training, "inference_bytes": self.bits / 8}
        return asdict(self) | {"output_shape": _times(self.output_shape)} | memory


@dataclass(frozen=True)
class NetworkSummary:
    """The rows of a network and their total.

    Attributes:
        image_shape: (C, H, W) of the image.
        layers: the rows, whose columns add up to :attr:`total`.
    """

    image_shape: tuple[int, int, int]
    layers: tuple[LayerSummary, ...]

    @property
    def total(self) -> LayerSummary:
        """The sum of all rows."""
        return _sum("total", "", self.layers)

    @property
    def twin_bits(self) -> int:
        """Memory of the full-precision twin at inference, in bits."""
        return 32 * self.total.parameters_twin

    @property
    def compression(self) -> float:
        """Bits of the full-precision twin divided by those of this network."""
        return self.twin_bits / self.total.bits

    @property
    def activations(self) -> int:
        """Values that a training step keeps for each image, roughly: twice the outputs of the listed layers.

        Autograd keeps 0.8 to 2.4 times as many, by the backbone.
        """
        return 2 * sum(math.prod(row.output_shape) for row in self.layers if row.output_shape)

    def table(self) -> str:
        """Format a table without all-zero columns, followed by parameters, operations and compression.

        Equal layers in a row share a row. Where exact numbers would be wider than the terminal, the table has three
        significant digits.
        """
        total = self.total
        counts = [row.counts() for row in (*_grouped(self.layers), total)]
        shown = [column for column in HEADERS if counts[-1][column] != 0]
        header = [HEADERS[column] for column in shown]
        exact, short = ([header, *([form(row[name]) for name in shown] for row in counts)] for form in (_exact, _short))
        table = text_table(exact, total=True, width=WIDEST)
        words = []
        if max(map(len, table.splitlines())) > terminal_width():
            table = text_table(short, total=True, gap=1)
            words = ["k, M and G are 10^3, 10^6 and 10^9; `summary --format csv` has exact numbers."]
        sizes = ((1, total.parameters_1bit), (2, total.parameters_2bit), (32, total.parameters_32bit))
        stored = ", ".join(f"{count:,} at {bits} bit{'s' * (bits > 1)}" for bits, count in sizes if count)
        words += [
            f"Parameters at inference: {stored}. Training takes gradients, optimizer state and activations on top.",
            f"Operations on {_times(self.image_shape)}: {total.operations:,.0f} (32-bit MACs + 1-bit MACs / 64) "
            f"against {total.macs_1bit + total.macs_32bit:,} of the full-precision twin.",
            f"Compression: {_megabits(total.bits)} at inference against {_megabits(self.twin_bits)} "
            f"of the full-precision twin, {self.compression:.1f}x.",
        ]
        return "\n".join([table, "", *map(filled, words)])

    def to_csv(self) -> str:
        """Format as CSV: a header, a line per row, and the total."""
        file = io.StringIO()
        writer = csv.DictWriter(file, self.total.as_dict(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.as_dict() for row in (*self.layers, self.total))
        return file.getvalue()

    def to_json(self) -> str:
        """Format as a JSON object with the image shape, the rows, their total, and the compression."""
        content = {
            "image_shape": self.image_shape,
            "layers": [row.as_dict() for row in self.layers],
            "total": self.total.as_dict(),
            "bits": self.total.bits,
            "twin_bits": self.twin_bits,
            "compression": self.compression,
        }
        return json.dumps(content, indent=2, ensure_ascii=False)


def summarize(network: nn.Module, image_shape: tuple[int, int, int]) -> NetworkSummary:
    """Count the parameters and multiply-accumulates of a network, which is not changed.

    Args:
        network: any network with 1-bit layers of type ``QuantizedConv2d`` and 1-bit activations of type
            ``SignActivation``.
        image_shape: (C, H, W).

    Raises:
        ValueError: if ``image_shape`` is not three positive sizes.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (channels, height, width), each at least 1, but got {image_shape!r}")
    work = _trace(network, image_shape)
    rows: list[LayerSummary] = []
    others: dict[str, list[LayerSummary]] = defaultdict(list)
    for name, module in network.named_modules():
        kind, (shape, *macs) = type(module).__name__, work.get(name, ((), 0, 0))
        row = LayerSummary(name, kind, shape, *_stored(module), _values(module), *macs)
        if isinstance(module, Multiplier):
            rows.append(row)
        elif row.values_training:
            others[kind].append(row)
    # One row for all norms and one for all activations, which are many and small.
    rows += [_sum(f"{len(group)} × {kind}", kind, group) for kind, group in others.items()]
    return NetworkSummary(image_shape, tuple(rows))


def _values(module: nn.Module) -> int:
    """Number of floating-point parameters and buffers of a module, without its children."""
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.numel() for tensor in held if tensor.is_floating_point())


def _stored(module: nn.Module) -> tuple[int, int, int, int]:
    """Parameters of a module without children: at inference at 1, 2 and 32 bits, and of its twin at 32 bits."""
    if isinstance(module, QuantizedConv2d):
        bias = 0 if module.bias is None else module.bias.numel()
        return *module.storage(), module.out_channels * module.weight[0].numel() + bias
    if isinstance(module, SignActivation):
        thresholds = 0 if module.threshold is None else module.threshold.numel()
        return 0, 0, 2 * thresholds, 0  # they are stored as a batch norm, and the twin has none
    stored = 2 * module.num_features if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) else _values(module)
    return 0, 0, stored, stored


@torch.no_grad()
def _trace(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Output shape, 1-bit and 32-bit multiply-accumulates of each layer that an image passes through.

    The image and the outputs of all layers are set to NaN, so that an input of ±1 can only come from a
    ``SignActivation``, whatever lies in between (dropout, slices, pools).
    """
    work: dict[str, tuple[tuple[int, ...], int, int]] = {}
    probe = copy.deepcopy(network).cpu().float().eval()  # a copy, so that no mode, buffer or pending loss changes

    def count(name: str, layer: Multiplier, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        _, binary, real = work.get(name, ((), 0, 0))  # a layer may be used twice
        macs = output.numel() * layer.weight[0].numel()
        signs = isinstance(layer, QuantizedConv2d) and layer.convolves_signs
        if signs and bool((inputs[0].abs() == 1).all()):
            binary += macs
        else:
            real += macs
        work[name] = tuple(output.shape[1:]), binary, real
        return torch.full_like(output, torch.nan)

    def alternate(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Both signs, so that neither their average nor their ReLU is mistaken for signs.
        return (1 - 2 * (torch.arange(output.numel()) % 2)).reshape(output.shape).to(output)

    for name, module in probe.named_modules():
        if isinstance(module, Multiplier):
            module.register_forward_hook(partial(count, name))
        elif isinstance(module, SignActivation):
            module.register_forward_hook(alternate)
    probe(torch.full((1, *image_shape), torch.nan, dtype=torch.float32, device="cpu"))
    return work


def _sum(layer: str, kind: str, rows: Iterable[LayerSummary]) -> LayerSummary:
    counts = [astuple(row)[3:] for row in rows]  # after name, kind and shape, all fields add up
    return LayerSummary(layer, kind, (), *map(sum, zip(*counts, strict=True)))


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _grouped(rows: Sequence[LayerSummary]) -> list[LayerSummary]:
    """Sum up equal layers that follow each other, if one name says which they are: ``6 × features.stage1.0-5.conv``."""
    found: list[LayerSummary] = []
    while rows:
        first = replace(rows[0], layer="")
        group = list(takewhile(lambda row: replace(row, layer="") == first, rows))  # noqa: B023  (used at once)
        while (name := _span([row.layer for row in group])) is None:
            group.pop()
        together = replace(_sum(f"{len(group)} × {name}", first.kind, group), output_shape=first.output_shape)
        found.append(together if len(group) > 1 else group[0])
        rows = rows[len(group) :]
    return found


def _span(names: Sequence[str]) -> str | None:
    """One name for all names that differ in numbers only, such as ``0-2.conv1-2`` for six; None if there is none."""
    split = [re.split(r"(\d+)", name) for name in names]
    numbers = [sorted(set(map(int, column))) for column in zip(*(parts[1::2] for parts in split), strict=False)]
    gapless = all(last - first + 1 == len(each) for each in numbers for first, last in [(each[0], each[-1])])
    if len({tuple(parts[::2]) for parts in split}) > 1 or math.prod(map(len, numbers)) != len(names) or not gapless:
        return None
    ranges = [f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in numbers]
    return "".join(chain.from_iterable(zip_longest(split[0][::2], ranges, fillvalue="")))


def _exact(value: str | int | float) -> str:
    return "-" if value == 0 else value if isinstance(value, str) else f"{value:,.0f}"


def _short(value: str | int | float) -> str:
    """Three significant digits: 37, 1.25k, 64.0M."""
    if isinstance(value, str) or value == 0:
        return _exact(value)
    units = iter(("", "k", "M", "G", "T", "P"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:#.3g}".rstrip(".") + unit if unit else f"{value:.3g}"


def _megabits(bits: int) -> str:
    return f"{bits / 1e6:,.{1 if bits >= 1e7 else 3}f} Mbit"
