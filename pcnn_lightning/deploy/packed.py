"""Frozen networks as files of one bit a sign.

A packed file is a safetensors file with two tensors, which hold all numbers of the frozen network in the order of its
``state_dict()``, each of its tensors row by row:

- ``floats``, float32;
- ``codes``, uint8: of what is int8 in the network, the place of each element in its layer's ``symbols``. A layer of two
  symbols (0 for -1, 1 for +1) has eight a byte, any other (ternary: 0, 1, 2 for -1, 0, +1) four, the first of them in
  the lowest bits. Each layer begins with a new byte.

Its metadata has one key, ``pcnn_lightning``, whose value is a JSON object of

- ``format_version``: 1;
- ``package_version``: what wrote it;
- ``description``: the fields of :class:`~pcnn_lightning.deploy.description.Description`, an object;
- ``crc32``: of the description, as Python writes it to JSON without spaces, then ``codes``, then ``floats``.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import pcnn_lightning
from pcnn_lightning.backbones import Network, build_backbone
from pcnn_lightning.deploy.description import Description
from pcnn_lightning.deploy.freeze import freeze
from pcnn_lightning.deploy.layers import FrozenModulatedConv2d, FrozenProjectionConv2d
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole
from pcnn_lightning.functional import Levels
from pcnn_lightning.layers import SignActivation

FORMAT_VERSION = 1
_KEY = "pcnn_lightning"


class PackedNetwork(Network):
    """A frozen network that knows what it was trained for. It takes normalised images, as the trained one does.

    Args:
        network: the frozen network.
        description: what it is.

    Attributes:
        description: what it is.
        mean: (C, 1, 1), per channel, in units of raw pixels.
        std: (C, 1, 1), likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, description: Description) -> None:
        nn.Module.__init__(self)
        self.features, self.classifier = network.features, network.classifier
        self.description = description
        for name, values in (("mean", description.mean), ("std", description.std)):
            self.register_buffer(name, 255 * torch.tensor(values).float().reshape(-1, 1, 1), persistent=False)

    @classmethod
    def of(cls, network: nn.Module, description: Description) -> "PackedNetwork":
        """Freeze a network, trained or frozen, on the CPU and with its floats as float32, and describe it.

        Raises:
            InputError: if the description is of another network, or a number is not finite.
        """
        try:
            frozen = freeze(network).cpu().float()
        except ValueError as error:
            raise InputError(f"the network cannot be exported: {error}") from error
        if _layout(frozen) != _layout(_skeleton(description)):
            raise InputError(f"the network is not the one of its description, {description}")
        if not all(tensor.isfinite().all() for tensor in frozen.state_dict().values()):
            raise InputError("the network cannot be exported: it holds NaN or infinite values")
        return cls(cast(Network, frozen), description).eval()

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise ``images`` (B, C, H, W) uint8, of the size that the network was trained for, as in training.

        Raises:
            ValueError: if they are of another type or shape.
        """
        shape = (self.description.in_channels, *self.description.image_size)
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != shape:
            raise ValueError(
                f"images must be uint8 of shape (B, {', '.join(map(str, shape))}), "
                f"but got {images.dtype} of shape {tuple(images.shape)}"
            )
        return images.to(self.mean.dtype).sub_(self.mean).div_(self.std)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Label (B,) of each of ``images`` (B, C, H, W) uint8, of the size that the network was trained for."""
        return cast(Tensor, self(self.preprocess(images))).argmax(dim=1)


def save_packed(network: nn.Module, path: str | os.PathLike[str], description: Description) -> None:
    """Write a network as a packed file, whole or not at all.

    Args:
        network: a network of a registered backbone, trained or frozen; its floats are written as float32.
        path: the file to write.
        description: what the network is, so that it can be built again.

    Raises:
        InputError: if the description is of another network, a number is not finite, or the file cannot be written.
    """
    codes, floats = _pack(PackedNetwork.of(network, description))
    header = {
        "format_version": FORMAT_VERSION,
        "package_version": pcnn_lightning.__version__,
        "description": description.as_dict(),
        "crc32": _checksum(description, codes, floats),
    }
    write_whole(Path(path), save({"codes": codes, "floats": floats}, {_KEY: _to_json(header)}))


def load_packed(path: str | os.PathLike[str]) -> PackedNetwork:
    """Read a network from a packed file onto the CPU.

    Nothing in the file is run, and no more memory is taken than the numbers in it fill.

    Raises:
        InputError: if there is no such file, or it is damaged, of another kind or version, or does not hold the network
            that it describes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description, checksum = _read_header(file.metadata())
            network = _skeleton(description)
            _check_sizes(network, file)
            codes, floats = file.get_tensor("codes"), file.get_tensor("floats")
            if _checksum(description, codes, floats) != checksum:
                raise InputError("its checksum is not that of what it holds")
            if not floats.isfinite().all():
                raise InputError("it holds NaN or infinite values")
            _unpack(network, codes, floats)
    except FileNotFoundError:
        raise InputError(f"there is no packed network {path}") from None
    except (SafetensorError, OSError, InputError) as error:
        raise InputError(f"{path} is damaged or no packed network of pcnn_lightning: {error}") from None
    return PackedNetwork(network, description).eval()


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a file that begins as a packed one does, with a length of 8 bytes and JSON."""
    try:
        with Path(path).open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def _skeleton(description: Description) -> Network:
    """The frozen network that is described, of tensors that have a shape but take no memory.

    Raises:
        InputError: if there is no such network.
    """
    one_bit = description.stage != "full_precision"

    def convolution(*shape: Any, planes: int = description.planes) -> nn.Module:
        if description.family == "MCN":
            levels = description.levels if one_bit else None
            return FrozenModulatedConv2d(*shape, planes=planes, average=description.average, levels=levels)
        if one_bit:
            return FrozenProjectionConv2d(*shape, levels=cast(Levels, description.stage))
        return nn.Conv2d(*shape, bias=False)  # type: ignore[misc]  # a shape is five sizes at most

    stages = None if description.stages is None else list(description.stages)
    try:
        with torch.device("meta"):
            network = build_backbone(
                description.backbone,
                description.num_classes,
                description.in_channels,
                convolution,
                SignActivation if one_bit and description.family == "PCNN" else nn.Identity,
                stages=stages,
                planes=description.planes,
            )
            return cast(Network, freeze(network))
    except (ValueError, RuntimeError) as error:  # torch's own for more elements than it can count
        raise InputError(f"there is no such network: {str(error).splitlines()[0]}") from error


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor, range | None]]:
    """Name and value of all that a frozen network stores, and what its elements may be where they are packed."""
    for name, tensor in network.state_dict().items():
        owner = network.get_submodule(name.rpartition(".")[0])
        yield name, tensor, getattr(owner, "symbols", None) if tensor.dtype == torch.int8 else None


def _layout(network: nn.Module) -> list[tuple[str, torch.Size, range | None]]:
    return [(name, tensor.shape, symbols) for name, tensor, symbols in _tensors(network)]


def _per_byte(symbols: range) -> int:
    return 8 if len(symbols) == 2 else 4


def _shifts(symbols: range) -> Tensor:
    return torch.arange(0, 8, 8 // _per_byte(symbols), dtype=torch.uint8)


def _pack(network: nn.Module) -> tuple[Tensor, Tensor]:
    codes, floats = [torch.empty(0, dtype=torch.uint8)], [torch.empty(0)]
    for _, tensor, symbols in _tensors(network):
        if symbols is None:
            floats.append(tensor.flatten())
        else:
            places = ((tensor.flatten() - symbols.start) // symbols.step).to(torch.uint8)
            filled = F.pad(places, (0, -len(places) % _per_byte(symbols))).view(-1, _per_byte(symbols))
            codes.append((filled << _shifts(symbols)).sum(dim=1, dtype=torch.uint8))
    return torch.cat(codes), torch.cat(floats)


def _unpack(network: nn.Module, codes: Tensor, floats: Tensor) -> None:
    """Give ``network`` its numbers, copied, in place of those that take no memory.

    Raises:
        InputError: if a code stands for nothing.
    """
    state = {}
    for name, tensor, symbols in _tensors(network):
        count = tensor.numel()
        if symbols is None:
            state[name], floats = floats[:count].view(tensor.shape).clone(), floats[count:]
        else:
            size = -(-count // _per_byte(symbols))
            mask = 1 if _per_byte(symbols) == 8 else 3
            places = ((codes[:size, None] >> _shifts(symbols)) & mask).flatten()[:count]
            if int(places.max()) >= len(symbols):
                raise InputError(f"{name} holds a code that stands for nothing")
            state[name] = (places.to(torch.int8) * symbols.step + symbols.start).view(tensor.shape)
            codes = codes[size:]
    network.load_state_dict(state, assign=True)


def _check_sizes(network: nn.Module, file: Any) -> None:
    sizes = {"codes": 0, "floats": 0}
    for _, shape, symbols in _layout(network):
        count = math.prod(shape)  # of whole numbers without end, unlike numel()
        if symbols is None:
            sizes["floats"] += count
        else:
            sizes["codes"] += -(-count // _per_byte(symbols))
    if sorted(file.keys()) != sorted(sizes):
        raise InputError("it must hold the tensors codes and floats, and no other")
    for name, dtype in (("codes", "U8"), ("floats", "F32")):
        part = file.get_slice(name)
        found = (part.get_dtype(), part.get_shape())
        if found != (dtype, [sizes[name]]):
            raise InputError(f"its network takes {name} of {dtype} {[sizes[name]]}, but it holds {found[0]} {found[1]}")


def _read_header(metadata: dict[str, str] | None) -> tuple[Description, object]:
    try:
        header = json.loads((metadata or {})[_KEY])
        version, description, checksum = (header[name] for name in ("format_version", "description", "crc32"))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError("it has no metadata of a packed network") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"it has format version {version!r}, but pcnn_lightning {pcnn_lightning.__version__} reads "
            f"version {FORMAT_VERSION}"
        )
    return Description.from_dict(description), checksum


def _checksum(description: Description, codes: Tensor, floats: Tensor) -> int:
    checksum = zlib.crc32(_to_json(description.as_dict()).encode())
    for tensor in (codes, floats):
        checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
    return checksum


def _to_json(content: object) -> str:
    return json.dumps(content, separators=(",", ":"))
