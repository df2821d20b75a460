"""OpenVINO: an export format for x86 processors, and the fast runtime there.

An exported network is a pair of files, ``NAME.xml`` and ``NAME.bin``, with the input ``images`` (1, C, H, W) uint8, of
the size that the network was trained for, and the output ``logits`` (1, num_classes) float32. The images are normalized
inside. It needs no other package than ``openvino``::

    import openvino

    core = openvino.Core()
    model = core.read_model("network.xml")
    model.reshape([8, *model.input().shape[1:]])  # for another batch size than 1
    description = model.get_rt_info(["pcnn_lightning", "description"]).astype(str)  # JSON
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits = compiled(images)["logits"]

Binary convolutions of signs become ``BinaryConvolution`` operations on 1-bit weights, which need a fixed batch size, an
x86 processor to be fast, a single group, and a multiple of 8 input channels. All other layers become ordinary
operations: their signs are stored at one bit each, or two bits if they have three or four values, and are floats in the
compiled model.
"""

import ctypes
import functools
import json
import os
import platform
import tempfile
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pcnn_lightning.backbones.mcn import PlaneConv, RepeatChannels, WholeMaxPool
from pcnn_lightning.checks import check_integer
from pcnn_lightning.deploy.description import Description
from pcnn_lightning.deploy.graph import Operation, operations
from pcnn_lightning.deploy.packed import PackedNetwork, load_packed
from pcnn_lightning.deploy.thresholds import sign_thresholds
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole
from pcnn_lightning.layers import FrozenBatchNorm2d, FrozenConv2d, SignActivation, TwoSlopePReLU
from pcnn_lightning.layers.modulated import FrozenModulatedConv2d

_KEY = "pcnn_lightning"
_LARGEST_PART = 16
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_X86 = ("x86_64", "amd64", "i386", "i686", "x86")


def save_openvino(network: nn.Module, path: str | os.PathLike[str], description: Description) -> None:
    """Write a network as an OpenVINO model, ``NAME.xml`` and ``NAME.bin``, each of them atomically.

    Args:
        network: a network that ``description`` describes, trained or frozen.
        path: the ``.xml`` file to write; the ``.bin`` file is written beside it.
        description: description of the network.

    Raises:
        InputError: if the path does not end in ``.xml``, the description is of another network, a value is not finite,
            a layer has no translation, a file cannot be written, or openvino is not installed.
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise InputError(f"an OpenVINO model is written as NAME.xml and NAME.bin, but the path is {path}")
    openvino = _openvino()
    model = to_openvino(PackedNetwork.of(network, description))
    with tempfile.TemporaryDirectory() as folder:
        xml, weights = Path(folder, "network.xml"), Path(folder, "network.bin")
        openvino.serialize(model, xml, weights)
        model.set_rt_info(str(zlib.crc32(weights.read_bytes())), [_KEY, "crc32"])
        openvino.serialize(model, xml, weights)
        # In this order, there is never an .xml file without a .bin file; the checksum tells if it is its own.
        write_whole(path.with_suffix(".bin"), weights.read_bytes())
        write_whole(path, xml.read_bytes())


def to_openvino(network: PackedNetwork) -> Any:
    """Translate a network to an ``openvino.Model`` for raw images, as :func:`save_openvino` writes it.

    Raises:
        InputError: if a layer has no translation or openvino is not installed.
    """
    _openvino()
    description = network.description
    shape = (description.in_channels, *description.image_size)
    graph = _Graph(network, shape)
    for operation in operations(network, shape):
        graph.add(operation)
    model = graph.model(operation.name)
    model.set_rt_info(json.dumps(description.as_dict()), [_KEY, "description"])
    return model


def compile_openvino(
    source: PackedNetwork | str | os.PathLike[str], threads: int | None = None
) -> "OpenVINOClassifier":
    """Compile a network for this processor, which takes a tenth of a second for each new batch size.

    In a forked process, call ``torch.set_num_threads(1)`` before, as data loaders do: torch's threads are not there.

    Args:
        source: a packed network, or the path of a packed file or of an exported ``.xml`` file.
        threads: number of threads; None takes torch's, ``torch.get_num_threads()``.

    Raises:
        InputError: if the file does not exist, is damaged or of another kind, a layer has no translation, or openvino
            is not installed.
        ValueError: if ``threads`` is not a positive integer.
    """
    if isinstance(source, PackedNetwork):
        model = to_openvino(source)
    elif Path(source).suffix == ".xml":
        model = _load(Path(source))
    else:
        model = to_openvino(load_packed(source))
    return OpenVINOClassifier(model, torch.get_num_threads() if threads is None else threads)


class OpenVINOClassifier:
    """A network compiled by OpenVINO. Threads can share it, and a forked process can go on using it.

    It runs one batch at a time, in parts of at most 16 images: operations take batches of a fixed size, and parts whose
    sizes are powers of two make up every batch from five compiled models.

    Args:
        model: what :func:`to_openvino` returns.
        threads: number of threads that work on a batch.

    Attributes:
        description: description of the network.
    """

    def __init__(self, model: Any, threads: int) -> None:
        check_integer("threads", threads, 1)
        self.description = _description_of(model)
        self._model, self._threads = model, threads
        self._requests: dict[int, Any] = {}  # by the number of images
        self._lock = threading.Lock()
        _CLASSIFIERS.add(self)
        binary = any(node.get_type_name() == "BinaryConvolution" for node in model.get_ops())
        if binary and platform.machine().lower() not in _X86:
            warnings.warn(
                f"OpenVINO has fast binary convolutions on x86 only, and a slow reference on {platform.machine()}",
                stacklevel=3,
            )

    def logits(self, images: Tensor) -> Tensor:
        """Compute the logits (B, num_classes) of ``images`` (B, C, H, W) uint8.

        Raises:
            ValueError: if they have another dtype, or another size than the network was trained for.
        """
        self.description.check_images(images)
        pixels = images.cpu().numpy()
        logits = np.empty((len(images), self.description.num_classes), np.float32)
        start = 0
        while start < len(images):
            end = start + min(_LARGEST_PART, 1 << (len(images) - start).bit_length() - 1)
            with self._lock:
                request = self._request(end - start)
                request.get_input_tensor().data[:] = pixels[start:end]
                request.infer()  # without arguments: a dictionary of results would take a fifth of the time
                logits[start:end] = request.get_output_tensor().data
            start = end
        return torch.from_numpy(logits)

    def classify(self, images: Tensor) -> Tensor:
        """Predict the label (B,) of ``images`` (B, C, H, W) uint8, of the size that the network was trained for."""
        return torch.from_numpy(self.logits(images).numpy().argmax(axis=1))  # torch's threads do not survive a fork

    def _request(self, size: int) -> Any:
        """What runs a part of ``size`` images."""
        if size not in self._requests:
            self._model.reshape([size, *self._model.input().shape[1:]])
            settings = {
                "INFERENCE_NUM_THREADS": self._threads,
                "INFERENCE_PRECISION_HINT": "f32",  # by default, some processors would compute in bfloat16
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,  # other processes would be pinned to the same cores
            }
            self._requests[size] = _core().compile_model(self._model, "CPU", settings).create_infer_request()
        return self._requests[size]

    def _start_again(self) -> None:
        """In a forked process, compile anew: the threads of what was compiled before are not there.

        It would wait for them for ever if it deleted that, also at its end, so a reference is left over.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._requests))
        self._requests, self._lock = {}, threading.Lock()


_CLASSIFIERS: "weakref.WeakSet[OpenVINOClassifier]" = weakref.WeakSet()


def _after_fork() -> None:
    for classifier in _CLASSIFIERS:
        classifier._start_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _load(path: Path) -> Any:
    """Read an exported pair of files.

    Raises:
        InputError: if it does not exist, is damaged or of another kind.
    """
    core = _core()
    try:
        xml, weights = path.read_bytes(), path.with_suffix(".bin").read_bytes()
        model = core.read_model(xml, weights)
        checksum = model.get_rt_info([_KEY, "crc32"]).astype(str)
        _description_of(model)
    except FileNotFoundError as error:
        raise InputError(f"there is no {error.filename}, and an exported network is NAME.xml and NAME.bin") from None
    except (OSError, RuntimeError, ValueError) as error:
        what = str(error).strip().splitlines()[-1]
        raise InputError(f"{path} is damaged or no exported network of pcnn_lightning: {what}") from None
    if checksum != str(zlib.crc32(weights)):
        raise InputError(f"{path.with_suffix('.bin')} is damaged, or of another network than {path}")
    return model


def _description_of(model: Any) -> Description:
    return Description.from_dict(json.loads(model.get_rt_info([_KEY, "description"]).astype(str)))


@functools.cache
def _core() -> Any:
    """OpenVINO's registry of devices; one is enough for a process."""
    return _openvino().Core()


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise InputError(f"OpenVINO is not installed ({error}): pip install '.[openvino]'") from error
    return openvino


class _Graph:
    """An OpenVINO model in the making. Values are its outputs by the names of the network's operations.

    Args:
        network: the network, for the normalization of its images.
        shape: (C, H, W) of the images.
    """

    def __init__(self, network: PackedNetwork, shape: tuple[int, int, int]) -> None:
        from openvino import Model, Node, opset15

        self.opset, self.make_model, self.node = opset15, Model, Node
        self.shapes: dict[str, tuple[int, ...]] = {"image": shape}
        self.images = opset15.parameter([1, *shape], np.uint8, name="images")
        self.images.output(0).set_names({"images"})
        pixels = opset15.subtract(self.floats(self.images), self.constant(network.mean[None]))
        normalized = opset15.divide(pixels, self.constant(network.std[None]))
        self.values: dict[str, Any] = {"image": normalized.output(0)}
        # Batch norms, and what is known of signs: the value that they are of, and its thresholds.
        self.norms: dict[str, tuple[str, FrozenBatchNorm2d]] = {}
        self.signs: dict[str, tuple[str, Tensor, Tensor]] = {}
        self.bits: dict[str, Any] = {}
        # Convolutions that can change places with an average.
        self.pointwise: dict[str, tuple[str, Any]] = {}
        self.translations: dict[type[nn.Module], Callable[[Operation, Any, Any], Any]] = {
            FrozenBatchNorm2d: self.norm,
            SignActivation: self.sign,
            FrozenConv2d: self.frozen_convolution,
            FrozenModulatedConv2d: self.frozen_convolution,
            nn.Conv2d: self.float_convolution,
            PlaneConv: self.plane_convolution,
            nn.Linear: self.linear,
            nn.ReLU: lambda _, __, x: opset15.relu(x),
            nn.PReLU: lambda _, module, x: opset15.prelu(x, self.constant(module.weight)),
            TwoSlopePReLU: self.two_slopes,
            nn.Identity: self.identity,
            nn.Flatten: self.flatten,
            nn.MaxPool2d: self.max_pool,
            nn.AvgPool2d: self.average_pool,
            nn.AdaptiveAvgPool2d: self.adaptive_average_pool,
            WholeMaxPool: lambda _, __, x: opset15.reduce_max(x, np.array([2, 3]), keep_dims=True),
            RepeatChannels: self.repeat_channels,
        }

    def add(self, operation: Operation) -> None:
        """Translate one operation, whose inputs were added before.

        Raises:
            InputError: if it has no translation.
        """
        inputs = [self.values[name] for name in operation.inputs]
        if operation.module is None:
            value = self.opset.add(*inputs)
        else:
            translate = self.translations.get(type(operation.module))
            if translate is None:
                raise self.unknown(operation, type(operation.module).__name__)
            value = translate(operation, operation.module, *inputs)
        if isinstance(value, self.node):  # not the output of an earlier one
            value.set_friendly_name(operation.name)
            value = value.output(0)
        self.values[operation.name], self.shapes[operation.name] = value, operation.shape

    def model(self, last: str) -> Any:
        """The model whose output is the value ``last``."""
        logits = self.opset.result(self.values[last])
        logits.output(0).set_names({"logits"})
        model = self.make_model([logits], [self.images], _KEY)
        # OpenVINO numbers what has no name through the whole process, so that no two files would be equal.
        for index, node in enumerate(model.get_ordered_ops()):
            if node.get_friendly_name() == node.get_name():
                node.set_friendly_name(f"{node.get_type_name()}_{index}")
        return model

    # Signs.

    def norm(self, operation: Operation, module: Any, x: Any) -> Any:
        self.norms[operation.name] = operation.inputs[0], module
        return self.normalize(x, module, operation)

    def normalize(self, x: Any, norm: FrozenBatchNorm2d, operation: Operation) -> Any:
        product = self.opset.multiply(x, self.per_channel(norm.scale, operation))
        return self.opset.add(product, self.per_channel(norm.shift, operation))

    def sign(self, operation: Operation, _: Any, x: Any) -> Any:
        """-1 and 1, for operations that take floats."""
        (source,) = operation.inputs
        thresholds, falls = _at_zero(operation.shape[0])
        if source in self.norms:
            source, norm = self.norms[source]
            thresholds, falls = sign_thresholds(norm)
        self.signs[operation.name] = source, thresholds, falls
        above = 1 - 2 * falls.float()
        reached = self.opset.greater(self.values[source], self.per_channel(_limits(thresholds), operation))
        return self.opset.select(reached, self.per_channel(above, operation), self.per_channel(-above, operation))

    def bits_of(self, name: str) -> Any:
        """A value of signs as 0 and 1, for binary convolutions."""
        if name not in self.bits:
            source, thresholds, falls = self.signs[name]
            x = self.values[source]
            if any(given.get_node().get_type_name() == "Constant" for given in x.get_node().input_values()):
                x = self.kept(x)  # else sums and products with constants would move into the limits, not exactly
            limits, lower, upper = (
                self.constant(values[None, :, None, None]) for values in (_limits(thresholds), falls, ~falls)
            )
            self.bits[name] = self.opset.fake_quantize(x, limits, limits, lower, upper, 2)
        return self.bits[name]

    def kept(self, x: Any) -> Any:
        """The same value, computed apart from what follows: OpenVINO merges operations if that is nearly the same."""
        return self.opset.maximum(x, np.float32(np.finfo(np.float32).min))

    # Convolutions.

    def float_convolution(self, operation: Operation, module: Any, x: Any) -> Any:
        if module.padding_mode != "zeros":
            raise self.unknown(operation, f"padding_mode {module.padding_mode!r}")
        if module is operation.module and _is_pointwise(module):
            self.pointwise[operation.name] = operation.inputs[0], module
        y = self.convolve(x, module.weight, module)
        return self.shifted(y, module)

    def frozen_convolution(self, operation: Operation, module: Any, x: Any) -> Any:
        (source,) = operation.inputs
        if source in self.signs and _is_right(module):
            weights = self.packed((module.signs > 0).to(torch.uint8), 1, bitorder="little")
            (top, bottom), (left, right) = _pads(module)
            y = self.opset.binary_convolution(
                self.bits_of(source),
                weights,
                list(module.stride),
                [top, left],
                [bottom, right],
                list(module.dilation),
                "xnor-popcount",
                0.0,
            )
            return self.scaled(y, module)
        return self.quantized_convolution(x, module, of_signs=source in self.signs)

    def quantized_convolution(self, x: Any, module: Any, of_signs: bool) -> Any:
        if type(module) is FrozenModulatedConv2d:
            return self.shifted(self.convolve(x, self.modulated_kernels(module), module), module)
        y = self.convolve(x, self.coded(module.signs, module.symbols), module)
        if of_signs:
            y = self.kept(y)  # else kernels would be multiplied by the scale, and sums not be whole numbers
        return self.scaled(y, module)

    def plane_convolution(self, operation: Operation, module: Any, x: Any) -> Any:
        (source,), opset = operation.inputs, self.opset
        channels, planes, (_, height, width) = self.shapes[source][0], module.planes, operation.shape
        if module.stride > 1:
            end, steps = np.full(2, np.iinfo(np.int64).max), np.full(2, module.stride)
            x = opset.slice(x, np.zeros(2, np.int64), end, steps, np.array([2, 3]))
        maps = opset.reshape(x, np.array([0, channels // planes, planes * height, width]), special_zero=True)
        if type(module.conv) is nn.Conv2d:
            y = self.float_convolution(operation, module.conv, maps)
        elif type(module.conv) in (FrozenConv2d, FrozenModulatedConv2d):
            y = self.quantized_convolution(maps, module.conv, of_signs=source in self.signs)
        else:
            raise self.unknown(operation, type(module.conv).__name__)
        return opset.reshape(y, np.array([0, *operation.shape]), special_zero=True)

    def convolve(self, x: Any, kernels: Any, module: Any) -> Any:
        """Convolve with ``kernels``, a value or a tensor."""
        (top, bottom), (left, right) = _pads(module)
        shape = list(module.stride), [top, left], [bottom, right], list(module.dilation)
        kernels = self.constant(kernels) if isinstance(kernels, Tensor) else kernels
        if module.groups == 1:
            return self.opset.convolution(x, kernels, *shape)
        sizes = module.groups, module.out_channels // module.groups, *kernels.shape[1:]
        return self.opset.group_convolution(x, self.opset.reshape(kernels, np.array(sizes), special_zero=False), *shape)

    def scaled(self, y: Any, module: Any) -> Any:
        """Times the scale, plus the bias, of a frozen layer."""
        if module.scale is not None:
            y = self.opset.multiply(y, self.constant(module.scale.reshape(1, -1, 1, 1)))
        return self.shifted(y, module)

    def shifted(self, y: Any, module: Any) -> Any:
        return y if module.bias is None else self.opset.add(y, self.constant(module.bias.reshape(1, -1, 1, 1)))

    def modulated_kernels(self, module: Any) -> Any:
        """The kernels Q[h * K + k] = Ĉ[h] ∘ |M_k|, computed when the model is compiled."""
        if module.levels == 2:
            kernels = self.opset.multiply(self.coded(module.signs, module.symbols), self.constant(module.scale))
        elif module.levels is None:
            kernels = self.constant(module.kernels)
        else:
            codes = self.opset.convert(self.packed(module.codes.to(torch.uint8), 2), "i32")
            kernels = self.opset.gather(self.constant(module.values), codes, np.int64(0))
        kernels = self.opset.unsqueeze(kernels, np.int64(1))
        kernels = self.opset.multiply(kernels, self.constant(module.modulation[None, :, None]))
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return self.opset.reshape(kernels, np.array(shape), special_zero=False)

    # PReLUs, pools and linear layers.

    def two_slopes(self, operation: Operation, module: Any, x: Any) -> Any:
        above = self.opset.multiply(self.opset.relu(x), self.per_channel(module.positive, operation))
        below = self.opset.multiply(self.opset.minimum(x, np.float32(0)), self.per_channel(module.negative, operation))
        return self.opset.add(above, below)

    def identity(self, operation: Operation, _: Any, x: Any) -> Any:
        (source,) = operation.inputs
        if source in self.signs:
            self.signs[operation.name] = self.signs[source]
        return x

    def max_pool(self, operation: Operation, module: Any, x: Any) -> Any:
        (source,) = operation.inputs
        if source in self.signs:
            self.signs[operation.name] = operation.name, *_at_zero(operation.shape[0])
        size, stride, padding, dilation = (
            list(_pair(value)) for value in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        return self.opset.max_pool(x, stride, dilation, padding, padding, size, _rounding(module))

    def average_pool(self, operation: Operation, module: Any, x: Any) -> Any:
        if module.divisor_override is not None:
            raise self.unknown(operation, "divisor_override")
        if module.ceil_mode and module.count_include_pad and any(_pair(module.padding)):
            raise self.unknown(operation, "ceil_mode with count_include_pad")  # the last averages would be wrong
        size, stride, padding = (list(_pair(value)) for value in (module.kernel_size, module.stride, module.padding))
        # Without padding there is none to count, but OpenVINO would count what it adds to round up.
        without = not module.count_include_pad or not any(padding)
        pool = functools.partial(
            self.opset.avg_pool,
            strides=stride,
            pads_begin=padding,
            pads_end=padding,
            kernel_shape=size,
            exclude_pad=without,
            rounding_type=_rounding(module),
        )
        convolved, norm = self.norms.get(operation.inputs[0], ("", None))
        if norm is None or convolved not in self.pointwise or not without:
            return pool(x)
        # The shortcuts of ResNets: to pool before the 1×1 convolution takes a quarter of the time, for the same means.
        source, convolution = self.pointwise[convolved]
        y = self.convolve(pool(self.values[source]), convolution.weight, convolution)
        return self.normalize(y, norm, operation)

    def adaptive_average_pool(self, operation: Operation, _: Any, x: Any) -> Any:
        _, *size = operation.shape
        if operation.shape == self.shapes[operation.inputs[0]]:
            return x
        if size == [1, 1]:
            return self.opset.reduce_mean(x, np.array([2, 3]), keep_dims=True)
        return self.opset.adaptive_avg_pool(x, np.array(size))

    def flatten(self, operation: Operation, module: Any, x: Any) -> Any:
        if (module.start_dim, module.end_dim) != (1, -1):
            raise self.unknown(operation, f"start_dim {module.start_dim} and end_dim {module.end_dim}")
        return self.opset.reshape(x, np.array([0, -1]), special_zero=True)

    def linear(self, _: Operation, module: Any, x: Any) -> Any:
        y = self.opset.matmul(x, self.constant(module.weight), False, True)
        return y if module.bias is None else self.opset.add(y, self.constant(module.bias))

    def repeat_channels(self, operation: Operation, module: Any, x: Any) -> Any:
        return self.opset.gather(x, np.arange(operation.shape[0]) // module.planes, np.int64(1))

    # Constants.

    def constant(self, values: Tensor) -> Any:
        return self.opset.constant(values.detach().numpy(), np.float32)

    def per_channel(self, values: Tensor, operation: Operation) -> Any:
        """A constant that broadcasts to the operation's output."""
        return self.constant(values.reshape(1, -1, *[1] * (len(operation.shape) - 1)))

    def floats(self, value: Any) -> Any:
        return self.opset.convert(value, "f32")

    def coded(self, values: Tensor, symbols: range) -> Any:
        """A constant of ``symbols``, stored at one bit, or two if there are more than two of them."""
        places = ((values - symbols.start) // symbols.step).to(torch.uint8)
        codes = self.floats(self.packed(places, 1 if len(symbols) == 2 else 2))
        if symbols.step != 1:
            codes = self.opset.multiply(codes, np.float32(symbols.step))
        return self.opset.add(codes, np.float32(symbols.start))

    def packed(self, codes: Tensor, width: int, bitorder: Literal["big", "little"] = "big") -> Any:
        """A constant of 1-bit or 2-bit codes.

        OpenVINO reads 1-bit constants from the most significant bit on, but those of a binary convolution from the
        least significant one, like 2-bit constants.
        """
        import openvino

        flat = codes.flatten().numpy()
        if width == 1:
            content, kind = np.packbits(flat, bitorder=bitorder), openvino.Type.u1
        else:
            pairs = np.pad(flat, (0, -len(flat) % 4)).reshape(-1, 4) << np.array([0, 2, 4, 6], np.uint8)
            content, kind = pairs.sum(axis=1, dtype=np.uint8), openvino.Type.u2
        return self.opset.constant(openvino.Tensor(content, openvino.Shape(codes.shape), kind), shared_memory=False)

    def unknown(self, operation: Operation, what: str) -> InputError:
        return InputError(f"{operation.name} cannot be exported to OpenVINO: it has no translation of {what}")


def _at_zero(channels: int) -> tuple[Tensor, Tensor]:
    """Thresholds of signs without a batch norm."""
    return torch.zeros(channels, dtype=torch.float32), torch.zeros(channels, dtype=torch.bool)


def _limits(thresholds: Tensor) -> Tensor:
    """Numbers that are exceeded where ``thresholds`` are reached.

    None is subnormal, as OpenVINO takes some of these for 0: subnormal numbers are not told from 0.
    """
    limits = torch.nextafter(thresholds, torch.full_like(thresholds, -torch.inf))
    return torch.where(limits.abs() < _SMALLEST_NORMAL, torch.where(limits < 0, -_SMALLEST_NORMAL, 0.0), limits)


def _is_right(module: Any) -> bool:
    """Whether OpenVINO's binary convolution computes this layer for an input of signs.

    It has no groups. For other input channels, and for wide kernels with a stride of 3, its results are wrong without
    a word.
    """
    if type(module) is not FrozenConv2d or module.levels != 2 or module.groups > 1 or module.in_channels % 8:
        return False
    pads = [pad for side in _pads(module) for pad in side]
    return max(module.kernel_size) <= 3 and max(module.stride) <= 2 and max(pads) <= 1 and module.dilation == (1, 1)


def _is_pointwise(module: Any) -> bool:
    shape = module.kernel_size, module.stride, module.padding
    return module.bias is None and shape == ((1, 1), (1, 1), (0, 0))


def _pads(module: Any) -> list[tuple[int, int]]:
    """Padding before and after the rows, and the columns, of a convolution's input."""
    if module.padding == "valid":
        return [(0, 0), (0, 0)]
    if module.padding == "same":
        totals = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(side, side) for side in module.padding]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _rounding(module: Any) -> str:
    return "ceil_torch" if module.ceil_mode else "floor"
