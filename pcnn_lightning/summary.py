"""What a network costs: parameters, memory and multiplications, layer by layer.

Parameters are counted as a network for inference stores them:

====================================  =====================================================================
projection layer                      1 bit for each element of D (ternary: 2 bits), and a 32-bit scale
modulated layer, two levels           1 bit for each element of C, and at 32 bits a scale and M: K * kh * kw
                                      values (MCN-1: K)
modulated layer, U = 3 or 4 levels    2 bits for each element of C, and at 32 bits U centres and M
modulated layer, U-MCN                C and M at 32 bits
batch norm                            a scale and a shift for each channel, which its four numbers fold into
everything else                       its parameters, at 32 bits
====================================  =====================================================================

Memory in training is all that is learned and the buffers, the running statistics of batch norms included, at 32 bits
each; gradients, the optimizer's state, activations and the center loss come on top. 1 kB is 1000 bytes.

A multiply-accumulate (MAC) has 1 bit where a projection layer convolves signs; all others have 32. They are those of
convolutions and linear layers, on one image, zeros of the padding included; norms, activations and pools have none.
Operations are counted as in XNOR-Net and Bi-Real Net: 32-bit MACs plus 1-bit MACs / 64, the elements of a machine
word. That holds for ternary kernels too: they need one AND more than an XNOR, but no second popcount.

Compression is by the bits of the full-precision twin at inference: the same network, an ordinary convolution with the
kernels D or Q in place of each 1-bit one. ResNet-18, J = 1, 1000 classes, comes to the published 33.6 and 374.2 Mbit:
10,985,472 bits and, at 32 bits each, 694,440 weights of stem, shortcuts and classifier, 8,704 numbers of batch norms,
3,904 of PReLUs and 16 scales.
"""

import copy
import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d, QuantizedConv2d, SignActivation
from pcnn_lightning.tables import aligned

Multiplier = nn.Conv2d | nn.Linear | QuantizedConv2d
"""What has multiply-accumulates: as many for each element of the output as there are elements in ``weight[0]``."""

HEADERS = {
    "layer": "layer",
    "output_shape": "output",
    "parameters_1bit": "1-bit",
    "parameters_2bit": "2-bit",
    "parameters_32bit": "32-bit",
    "training_kB": "train kB",
    "inference_kB": "infer kB",
    "macs_1bit": "1-bit MACs",
    "macs_32bit": "32-bit MACs",
}
"""The columns of the table."""


@dataclass(frozen=True)
class LayerSummary:
    """A row: one convolution or linear layer, all other modules of one type, or the total.

    Attributes:
        layer: the module's name in the network, or how many modules of which type.
        kind: the type of the module; empty for the total.
        output_shape: (C, H, W) or (C,), without the batch; empty for more than one module.
        parameters_1bit: parameters stored at 1 bit at inference.
        parameters_2bit: parameters stored at 2 bits at inference.
        parameters_32bit: parameters stored at 32 bits at inference.
        parameters_twin: parameters of the full-precision twin at inference, at 32 bits.
        values_training: numbers held in training, at 32 bits.
        macs_1bit: 1-bit multiply-accumulates of one image.
        macs_32bit: 32-bit multiply-accumulates of one image.
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
        """What files hold: the fields, memory in kB in place of what it is computed from, and the operations."""
        content = asdict(self)
        del content["parameters_twin"], content["values_training"]
        memory = {"training_kB": self.values_training * 4 / 1000, "inference_kB": self.bits / 8000}
        return content | {"output_shape": _times(self.output_shape)} | memory | {"operations": self.operations}


@dataclass(frozen=True)
class NetworkSummary:
    """The rows of a network and what they come to.

    Attributes:
        image_shape: (C, H, W) of the image that was counted for.
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
        """How many times the bits of this network its full-precision twin has."""
        return self.twin_bits / self.total.bits

    def table(self) -> str:
        """Aligned columns, without those that are zero throughout, then what they mean and come to."""
        total = self.total
        contents = [row.as_dict() for row in (*self.layers, total)]
        shown = [column for column in HEADERS if contents[-1][column] != 0]
        rows = [[HEADERS[column] for column in shown]]
        rows += [[_cell(content[column]) for column in shown] for content in contents]
        lines = aligned(rows)
        rule = "-" * len(lines[0])
        words = [
            "1 kB is 1000 bytes; training takes gradients, optimizer state and activations on top.",
            f"Operations on {_times(self.image_shape)}: {total.operations:,.0f} (32-bit MACs + 1-bit MACs / 64) "
            f"against {total.macs_1bit + total.macs_32bit:,} of the full-precision twin.",
            f"Compression: {_megabits(total.bits)} at inference against {_megabits(self.twin_bits)} "
            f"of the full-precision twin, {self.compression:.1f}x.",
        ]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", *words])

    def to_csv(self) -> str:
        """A header, a line for each row, and the total."""
        file = io.StringIO()
        writer = csv.DictWriter(file, self.total.as_dict(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.as_dict() for row in (*self.layers, self.total))
        return file.getvalue()

    def to_json(self) -> str:
        """An object of the image's shape, the rows, their total, and the bits that the compression is made of."""
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
    """Count what a network stores, and computes for one image. The network itself is not touched.

    Args:
        network: any network, its 1-bit layers of type ``QuantizedConv2d`` and its 1-bit activations
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
    # One row for all norms and one for all activations: they outnumber the layers, and each weighs next to nothing.
    rows += [_sum(f"{len(group)} × {kind}", kind, group) for kind, group in others.items()]
    return NetworkSummary(image_shape, tuple(rows))


def _values(module: nn.Module) -> int:
    """How many numbers a module itself holds in training; a counter of batches is none."""
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.numel() for tensor in held if tensor.is_floating_point())


def _stored(module: nn.Module) -> tuple[int, int, int, int]:
    """How many parameters a module itself stores at inference: at 1, 2 and 32 bits, and its twin at 32 bits."""
    if isinstance(module, ProjectionConv2d):
        elements = module.weight.numel() * module.projections
        return (elements, 0, 1, elements) if module.levels == "binary" else (0, elements, 1, elements)
    if isinstance(module, ModulatedConv2d):
        elements, twin = module.weight.numel(), module.weight.numel() * module.planes
        modulation = module.planes if module.average else module.modulation.numel()
        if not module.binarize:
            return 0, 0, elements + modulation, twin
        if module.levels == 2:
            return elements, 0, modulation + 1, twin
        return 0, elements, modulation + module.levels, twin
    stored = 2 * module.num_features if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) else _values(module)
    return 0, 0, stored, stored


@torch.no_grad()
def _trace(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """The output shape, the 1-bit and the 32-bit multiply-accumulates of each layer that an image passes.

    To tell signs from real numbers whatever moves them on their way (dropout, slices, pools), the image is NaN, and so
    is all that a layer puts out: what a layer sees is ±1 only where it comes from a ``SignActivation``.
    """
    work: dict[str, tuple[tuple[int, ...], int, int]] = {}
    probe = copy.deepcopy(network).cpu().float().eval()  # a copy: no mode, buffer or pending loss of the user's changes

    def count(name: str, layer: Multiplier, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        _, binary, real = work.get(name, ((), 0, 0))  # a layer may be passed twice
        macs = output.numel() * layer.weight[0].numel()
        if isinstance(layer, ProjectionConv2d) and bool((inputs[0].abs() == 1).all()):
            binary += macs
        else:
            real += macs
        work[name] = tuple(output.shape[1:]), binary, real
        return torch.full_like(output, torch.nan)

    def alternate(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Of both signs, so that neither their average nor their ReLU is taken for signs.
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


def _cell(value: str | int | float) -> str:
    if value == 0:
        return "-"
    # kB to the byte, so that a column adds up to what is printed below it.
    return value if isinstance(value, str) else f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def _megabits(bits: int) -> str:
    return f"{bits / 1e6:,.{1 if bits >= 1e7 else 3}f} Mbit"
