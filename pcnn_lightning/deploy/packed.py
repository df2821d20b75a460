"""Frozen networks as files with one bit per sign.

A packed file is a safetensors file with two tensors, which hold all values of the frozen network in the order of its
``state_dict()``, each of its tensors in row-major order:

- ``floats``, float32;
- ``codes``, uint8: for each element of the int8 tensors, its index in the ``symbols`` of the layer. A layer with two
  symbols (0 for -1, 1 for +1) has eight codes per byte, any other (ternary: 0, 1, 2 for -1, 0, +1) has four, the first
  one in the lowest bits. Each layer starts with a new byte.

Its metadata has one key, ``pcnn_lightning``, whose value is a JSON object with

- ``format_version``: 2;
- ``package_version``: version of the package that wrote the file;
- ``description``: the fields of :class:`~pcnn_lightning.deploy.description.Description`, an object;
- ``crc32``: checksum of the description, as Python writes it to JSON without spaces, then ``codes``, then ``floats``;
- ``layout_crc32``, for a converted network only: checksum of the names, shapes and symbols of its tensors, since the
  code that makes the network may change.
"""

import json
import math
import os
import reprlib
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pcnn_lightning.backbones import BACKBONES, Network, build_backbone
from pcnn_lightning.backbones.external import converted_network, external_network, front_of, users_network
from pcnn_lightning.deploy.description import Description
from pcnn_lightning.deploy.freeze import freeze
from pcnn_lightning.errors import InputError
from pcnn_lightning.families import FAMILIES
from pcnn_lightning.files import write_whole
from pcnn_lightning.layers import SignActivation
from pcnn_lightning.version import __version__

Factory = Callable[[], nn.Module]
"""Makes a network of the user's own, before its conversion."""

FORMAT_VERSION = 2
_KEY = "pcnn_lightning"


class _Unsupported(InputError):
    """A packed file that another version can read, or this one if another package is imported."""


class PackedNetwork(Network):
    """A frozen network with its description. It takes normalized images, like the trained network.

    Args:
        network: the frozen network.
        description: its description.

    Attributes:
        description: its description.
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
            pixels = 255 * torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, pixels.reshape(-1, 1, 1), persistent=False)

    @classmethod
    def of(cls, network: nn.Module, description: Description) -> "PackedNetwork":
        """Freeze a network, trained or frozen, move it to the CPU in float32, and attach its description.

        Raises:
            InputError: if the description is of another network, or a value is not finite.
        """
        try:
            frozen = freeze(network).cpu().float()
        except ValueError as error:
            raise InputError(f"the network cannot be exported: {error}") from error
        own = None
        if description.conversion is not None and (path := description.conversion["own"]) is not None:
            own = partial(users_network, path, description.num_classes, description.in_channels)
        if _layout(frozen) != _layout(_skeleton(description, own)):
            raise InputError(f"the network is not the one of its description, {description}")
        if not all(tensor.isfinite().all() for tensor in frozen.state_dict().values()):
            raise InputError("the network cannot be exported: it holds NaN or infinite values")
        return cls(cast(Network, frozen), description).eval()

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalize ``images`` (B, C, H, W) uint8, of the size that the network was trained for, as in training.

        Raises:
            ValueError: if they have another dtype or shape.
        """
        self.description.check_images(images)
        return images.to(self.mean.dtype).sub_(self.mean).div_(self.std)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Predict the label (B,) of ``images`` (B, C, H, W) uint8, of the size that the network was trained for."""
        return cast(Tensor, self(self.preprocess(images))).argmax(dim=1)


def save_packed(network: nn.Module, path: str | os.PathLike[str], description: Description) -> None:
    """Write a network as a packed file, atomically.

    Args:
        network: a network that ``description`` describes, trained or frozen; its floats are written as float32.
        path: the file to write.
        description: description of the network, from which it can be rebuilt.

    Raises:
        InputError: if the description is of another network, a value is not finite, or the file cannot be written.
    """
    frozen = PackedNetwork.of(network, description)
    codes, floats = _pack(frozen)
    header = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "description": description.as_dict(),
        "crc32": _checksum(description, codes, floats),
    }
    if description.conversion is not None:  # by code that may change
        header["layout_crc32"] = _layout_checksum(frozen)
    write_whole(Path(path), save({"codes": codes, "floats": floats}, {_KEY: _to_json(header)}))


def load_packed(path: str | os.PathLike[str], network: Factory | None = None) -> PackedNetwork:
    """Load a network from a packed file onto the CPU.

    No code from the file is executed. No more memory is allocated than its values need, but for what ``network`` makes.

    Args:
        path: the file.
        network: makes the network that was converted, if it is the user's own.

    Raises:
        InputError: if the file does not exist, is damaged, is of another kind or version, does not hold the network
            that it describes, or holds one of a family or backbone that is not registered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description, checksum, layout = _read_header(file.metadata())
            skeleton = _skeleton(description, network)
            if layout not in (None, _layout_checksum(skeleton)):
                raise _Unsupported("is of another network than the one that is made for it now")
            _check_sizes(skeleton, file)
            codes, floats = file.get_tensor("codes"), file.get_tensor("floats")
            if _checksum(description, codes, floats) != checksum:
                raise InputError("its checksum is not that of what it holds")
            if not floats.isfinite().all():
                raise InputError("it holds NaN or infinite values")
            _unpack(skeleton, codes, floats)
    except FileNotFoundError:
        raise InputError(f"there is no packed network {path}") from None
    except _Unsupported as error:
        raise InputError(f"{path} {error}") from None
    except (SafetensorError, OSError, InputError) as error:
        raise InputError(f"{path} is damaged or no packed network of pcnn_lightning: {error}") from None
    return PackedNetwork(skeleton, description).eval()


def _skeleton(description: Description, own: Factory | None = None) -> Network:
    """Build the described frozen network from tensors that have a shape but no memory.

    Raises:
        InputError: if there is no such network.
    """
    layer = FAMILIES[description.family].layer

    def convolution(*shape: Any, planes: int = description.planes, **options: Any) -> nn.Module:
        if description.stage == "full_precision":
            return nn.Conv2d(*shape, **{"bias": False, **options})
        return layer.empty_frozen(*shape, stage=description.stage, planes=planes, **(description.layer | options))

    try:
        if description.conversion is not None:
            return cast(Network, freeze(_converted(description, description.conversion, convolution, own)))
        with torch.device("meta"):
            network = build_backbone(
                description.backbone,
                description.num_classes,
                description.in_channels,
                convolution,
                SignActivation if description.sign_activations else nn.Identity,
                widths=None if description.widths is None else list(description.widths),
                planes=description.planes,
                **description.block,
            )
            return cast(Network, freeze(network))
    except _Unsupported:
        raise
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: more elements than torch can count
        raise InputError(f"there is no such network: {str(error).splitlines()[0]}") from error


def _converted(
    description: Description, conversion: dict[str, Any], convolution: Callable[..., nn.Module], own: Factory | None
) -> nn.Module:
    """A network from outside this package, converted, on tensors without memory."""
    with torch.random.fork_rng(devices=[]):
        if conversion["own"] is not None:
            network = _made_by(own, conversion["own"])
        else:
            with torch.device("meta"):
                network = external_network(
                    description.backbone,
                    description.num_classes,
                    description.in_channels,
                    small_images=conversion["small_images"],
                )
    converted, _ = converted_network(
        network.to("meta"),
        (description.in_channels, *description.image_size),
        convolution,
        activation=front_of(conversion["activations"], SignActivation),
        include=list(conversion["layers"]),
        overrides={name: options for name, options in conversion["layers"].items() if options},
    )
    return converted


def _made_by(own: Factory | None, path: str) -> nn.Module:
    if own is None:
        raise _Unsupported(f"is of a network of {path}: load_packed(path, network=...) takes a function that makes it")
    try:
        network = own()
    except Exception as error:  # whatever the function does
        raise _Unsupported(f"needs a function without arguments as network, but that failed: {error}") from error
    if not isinstance(network, nn.Module):
        raise _Unsupported(f"needs a function that makes a network, but that made {type(network).__name__}")
    return network


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor, range | None]]:
    """Yield name and value of each tensor that a frozen network stores, and its symbols if it is packed as codes."""
    for name, tensor in network.state_dict().items():
        if tensor.dtype != torch.int8 and not tensor.is_floating_point():
            raise InputError(f"{name} cannot be packed: it is {tensor.dtype}, not float or int8")
        owner = network.get_submodule(name.rpartition(".")[0])
        yield name, tensor, getattr(owner, "symbols", None) if tensor.dtype == torch.int8 else None


def _layout(network: nn.Module) -> list[tuple[str, torch.Size, range | None]]:
    return [(name, tensor.shape, symbols) for name, tensor, symbols in _tensors(network)]


def _per_byte(symbols: range) -> int:
    return 8 if len(symbols) == 2 else 4


def _shifts(symbols: range) -> Tensor:
    return torch.arange(0, 8, 8 // _per_byte(symbols), dtype=torch.uint8)


def _pack(network: nn.Module) -> tuple[Tensor, Tensor]:
    codes, floats = [torch.empty(0, dtype=torch.uint8)], [torch.empty(0, dtype=torch.float32)]
    for _, tensor, symbols in _tensors(network):
        if symbols is None:
            floats.append(tensor.flatten())
        else:
            places = ((tensor.flatten() - symbols.start) // symbols.step).to(torch.uint8)
            filled = F.pad(places, (0, -len(places) % _per_byte(symbols))).view(-1, _per_byte(symbols))
            codes.append((filled << _shifts(symbols)).sum(dim=1, dtype=torch.uint8))
    return torch.cat(codes), torch.cat(floats)


def _unpack(network: nn.Module, codes: Tensor, floats: Tensor) -> None:
    """Load copies of the values into ``network``, in place of its tensors without memory.

    Raises:
        InputError: if a code stands for no symbol.
    """
    state = network.state_dict()  # with the versions of its modules
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
        count = math.prod(shape)  # Python integers do not overflow, unlike numel()
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


def _read_header(metadata: dict[str, str] | None) -> tuple[Description, object, object]:
    """The description, the checksum of description and values, and that of the layout of a converted network."""
    try:
        header = json.loads((metadata or {})[_KEY])
        version = header["format_version"]
        if version == FORMAT_VERSION:
            description, checksum = header["description"], header["crc32"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError("it has no metadata of a packed network") from None
    if version != FORMAT_VERSION:
        reads = f"pcnn_lightning {__version__} reads version {FORMAT_VERSION}"
        raise _Unsupported(f"has format version {reprlib.repr(version)}, but {reads}")
    known: dict[str, Collection[str]] = {"family": FAMILIES}
    if isinstance(description, dict) and description.get("conversion") is None:
        known["backbone"] = BACKBONES
    for kind, names in known.items():
        name = description.get(kind) if isinstance(description, dict) else None
        if isinstance(name, str) and name not in names:
            what = f"{kind} {reprlib.repr(name)}"
            raise _Unsupported(f"is of {what}, which is not registered: import the package that registers it")
    return Description.from_dict(description), checksum, header.get("layout_crc32")


def _checksum(description: Description, codes: Tensor, floats: Tensor) -> int:
    checksum = zlib.crc32(_to_json(description.as_dict()).encode())
    for tensor in (codes, floats):
        checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
    return checksum


def _layout_checksum(network: nn.Module) -> int:
    return zlib.crc32(repr(_layout(network)).encode())


def _to_json(content: object) -> str:
    return json.dumps(content, separators=(",", ":"))
