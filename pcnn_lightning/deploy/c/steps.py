"""A frozen network as the calls of C functions that compute it.

Each function is a file of the folder ``kernels``. One call computes several layers where it can: a convolution, the
batch norm, sum and PReLU behind it; a batch norm and the sign behind it.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from pcnn_lightning.backbones.mcn import PlaneConv, RepeatChannels, WholeMaxPool
from pcnn_lightning.deploy.c.weights import Field, array, linear_weights, number_weights, sign_weights
from pcnn_lightning.deploy.graph import Operation, operations
from pcnn_lightning.deploy.packed import PackedNetwork
from pcnn_lightning.deploy.thresholds import sign_thresholds
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import (
    FrozenBatchNorm2d,
    FrozenConv2d,
    FrozenModulatedConv2d,
    SignActivation,
    TwoSlopePReLU,
)

DECODED = 8
"""Number of input channels whose weights ``convolve.c`` decodes at a time."""

Shape = tuple[int, int, int]
"""(C, H, W). In C, the channels of a pixel are adjacent."""

_Convolution = nn.Conv2d | FrozenConv2d
_PRELUS = (nn.PReLU, nn.ReLU, TwoSlopePReLU)
_CONVOLUTIONS = (nn.Conv2d, FrozenConv2d, FrozenModulatedConv2d)


@dataclass(eq=False)
class Value:
    """Memory that a step writes.

    Attributes:
        name: path of the module whose output it is, or what it is for.
        size: number of floats, or of words.
        shape: shape of an image.
        in_words: whether it holds words instead of floats.
    """

    name: str
    size: int
    shape: Shape = (0, 0, 0)
    in_words: bool = False

    @classmethod
    def of_image(cls, name: str, shape: Shape) -> "Value":
        """Memory for an image of floats."""
        return cls(name, shape[0] * shape[1] * shape[2], shape)


@dataclass(eq=False)
class Step:
    """The call of a C function: ``function(&layer, inputs..., output, scratch...)``.

    Attributes:
        function: name of the function.
        struct: type of the layer.
        name: path of the module that the layer is named after.
        fields: fields of the layer.
        inputs: its inputs; None for a shortcut that there is not.
        output: its output.
        scratch: memory that it needs until it returns; None if it does not.
        may_overwrite: the inputs that the output may take the memory of.
    """

    function: str
    struct: str
    name: str
    fields: dict[str, Field]
    inputs: list[Value | None]
    output: Value
    scratch: list[Value | None] = field(default_factory=list)
    may_overwrite: list[Value] = field(default_factory=list)


@torch.no_grad()
def steps_of(network: PackedNetwork) -> list[Step]:
    """The steps from a raw image to the logits, which the last one writes.

    Raises:
        InputError: names the module that cannot be translated.
    """
    return _Translation(network).steps


class _Finish:
    """What a step does with the sums of a convolution: ``prelu(sums * scale + shift + shortcut)``.

    Attributes:
        end: name of the last operation that is part of the step.
        pool: an average pool that is part of it, or None.
    """

    def __init__(self, name: str, channels: int) -> None:
        self.end, self.channels = name, channels
        self.pool: Operation | None = None
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.shortcut: Value | None = None
        self.positive: Tensor | None = None
        self.negative: Tensor | None = None

    def multiply_add(self, scale: Tensor | None, shift: Tensor | None) -> None:
        if scale is not None:
            scale = scale.flatten().expand(self.channels)
            self.scale = scale if self.scale is None else self.scale * scale
            self.shift = None if self.shift is None else self.shift * scale
        if shift is not None:
            self.shift = shift if self.shift is None else self.shift + shift

    def fields(self) -> dict[str, Field]:
        return {name: array(getattr(self, name)) for name in ("scale", "shift", "positive", "negative")}


class _Translation:
    """Translates operations in their order, each together with those behind it that are part of the same step.

    The sign of an activation is taken when a layer asks for it: as bits or as numbers.
    """

    def __init__(self, network: PackedNetwork) -> None:
        self.steps: list[Step] = []
        self.values: dict[str, Value] = {}  # outputs of operations as numbers, and as bits
        self.bits: dict[str, Value] = {}
        image = (network.description.in_channels, *network.description.image_size)
        self.shapes: dict[str, Shape] = {"image": image}
        self.operations: dict[str, Operation] = {}
        sources: dict[str, str] = {}  # of operations that do nothing in C
        for one in operations(network, image):
            inputs = tuple(sources.get(name, name) for name in one.inputs)
            flattens = type(one.module) is nn.Flatten and (one.module.start_dim, one.module.end_dim) == (1, -1)
            if flattens or type(one.module) is nn.Identity:
                sources[one.name] = inputs[0]
            else:
                self.operations[one.name] = Operation(one.name, one.module, inputs, one.shape)
                self.shapes[one.name] = cast(Shape, (*one.shape, 1, 1)[:3])
        self.users: dict[str, list[Operation]] = {name: [] for name in self.shapes}
        for one in self.operations.values():
            for name in one.inputs:
                self.users[name].append(one)
        self.fused: set[str] = set()  # operations behind the first one of a step
        self.load_image(network)
        for one in self.operations.values():
            if one.name not in self.fused and not self.is_for_signs(one):
                self.translate(one)
        last = self.value(next(reversed(self.operations)))
        assert self.steps[-1].output is last

    def translate(self, one: Operation) -> None:
        kind = type(one.module)  # exactly: a subclass may compute anything
        if kind in _CONVOLUTIONS:
            self.convolve(one, cast(_Convolution, one.module))
        elif kind is PlaneConv:
            self.convolve_planes(one, cast(PlaneConv, one.module))
        elif kind is nn.Linear:
            self.classify(one, cast(nn.Linear, one.module))
        elif kind in (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, WholeMaxPool):
            self.pool(one, self.value(one.inputs[0]))
        elif kind in (FrozenBatchNorm2d, *_PRELUS) or one.module is None:
            self.finish_image(one)
        else:
            raise _refusal(one, "there is no translation for modules of this kind")

    # Values.

    def add(self, step: Step) -> None:
        self.steps.append(step)
        if step.output.in_words:
            self.bits[step.output.name] = step.output
        else:
            self.values[step.output.name] = step.output

    def value(self, name: str) -> Value:
        """The output of an operation as numbers."""
        if name not in self.values:  # only signs are not computed yet
            self.take_signs(name, as_bits=False)
        return self.values[name]

    def bits_of(self, name: str) -> Value:
        """The output of a sign activation as bits."""
        if name not in self.bits:
            self.take_signs(name, as_bits=True)
        return self.bits[name]

    def before_sign(self, name: str) -> tuple[str, FrozenBatchNorm2d | None]:
        """What a sign activation is of, in front of its batch norm, and that norm, if it has one."""
        (source,) = self.operations[name].inputs
        before = self.operations.get(source)
        if before is not None and type(before.module) is FrozenBatchNorm2d:
            return before.inputs[0], before.module
        return source, None

    def is_sign(self, name: str) -> bool:
        return name in self.operations and type(self.operations[name].module) is SignActivation

    def is_for_signs(self, one: Operation) -> bool:
        """Whether an operation is a sign, or a batch norm of which nothing but the sign is used."""
        users = self.users[one.name]
        is_norm = type(one.module) is FrozenBatchNorm2d and len(users) > 0
        return self.is_sign(one.name) or (is_norm and all(self.is_sign(user.name) for user in users))

    # Steps.

    def load_image(self, network: PackedNetwork) -> None:
        channels, height, width = self.shapes["image"]
        name, planes = "image", 1
        users = self.users["image"]
        if len(users) == 1 and isinstance(users[0].module, RepeatChannels):
            name, planes = users[0].name, users[0].module.planes
            self.fused.add(name)
        fields: dict[str, Field] = {"channels": channels, "pixels": height * width, "planes": planes}
        fields |= {"mean": array(network.mean), "std": array(network.std)}
        self.add(Step("load_image", "Image", "image", fields, [], Value.of_image(name, self.shapes[name])))

    def take_signs(self, name: str, as_bits: bool) -> None:
        source, norm = self.before_sign(name)
        image = self.value(source)
        channels, height, width = image.shape
        thresholds, falls = torch.zeros(channels), torch.zeros(channels, dtype=torch.bool)
        if norm is not None:
            thresholds, falls = sign_thresholds(norm)
        fields: dict[str, Field] = {"channels": channels, "pixels": height * width, "thresholds": array(thresholds)}
        if as_bits:
            bits = Value(name, height * width * -(-channels // 32), image.shape, in_words=True)
            self.add(Step("pack_signs", "Threshold", name, fields, [image], bits))
        else:
            fields["above"] = array(1.0 - 2.0 * falls)
            self.add(Step("take_signs", "Signs", name, fields, [image], Value.of_image(name, image.shape)))

    def convolve(self, one: Operation, layer: _Convolution, stride: int | None = None) -> None:
        """Convolve signs or numbers; ``stride``, if given, replaces that of the layer."""
        size, own_stride, padding = _square(one, layer)
        stride = own_stride if stride is None else stride
        source, finish = one.inputs[0], _finish_of(one.name, layer)
        if type(layer) is FrozenConv2d and layer.groups == 1 and self.is_sign(source):
            self.follow(finish)
            image = self.bits_of(source)
            _, norm = self.before_sign(source)
            falls = torch.zeros(layer.in_channels, dtype=torch.bool) if norm is None else norm.scale < 0
            shape = _shape(image.shape, self.shapes[one.name], size, stride, padding)
            fields: dict[str, Field] = {"shape": shape, "planes": 2 if layer.levels == 3 else 1}
            fields["weights"] = sign_weights(layer, falls)
            scratch = [Value("counts", layer.out_channels, in_words=True), Value("pixel", layer.out_channels)]
            self.finish("convolve_signs", "SignConvolution", one.name, fields, image, finish, [*scratch])
            return
        # The mean of 1×1 convolutions is the 1×1 convolution of the mean, which is less work.
        self.follow(finish, may_pool=(size, stride, padding) == (1, 1, 0))
        image = self.value(source)
        if finish.pool is not None:
            image = self.pool(finish.pool, image)
        shape = _shape(image.shape, self.shapes[finish.pool.name if finish.pool else one.name], size, stride, padding)
        self.convolve_numbers(one.name, shape, number_weights(layer), image, finish)

    def convolve_planes(self, one: Operation, layer: PlaneConv) -> None:
        """Convolve the planes of an image, laid out as pixels side by side whose channels are feature maps."""
        inner = cast(_Convolution, layer.conv)
        if type(inner) not in _CONVOLUTIONS:
            raise _refusal(one, f"there is no translation for its {type(inner).__name__}")
        if layer.planes == 1:
            self.convolve(one, inner, layer.stride)
            return
        image, (_, height, width) = self.value(one.inputs[0]), self.shapes[one.name]
        size, sides = layer.planes, {"out_height": height, "out_width": width}
        split = Value.of_image(f"{one.name}.planes", (inner.in_channels, height, width * size))
        fields: dict[str, Field] = {"in_width": image.shape[2], "stride": layer.stride, **sides}
        fields |= {"rows": inner.in_channels, "columns": size}
        self.add(Step("transpose", "Transpose", split.name, fields, [image], split))
        finish = _finish_of(f"{one.name}.conv", inner)
        shape = _shape(split.shape, (inner.out_channels, height, width * size), 1, 1, 0)
        convolved = self.convolve_numbers(finish.end, shape, number_weights(inner), split, finish)
        fields = {"in_width": width, "stride": 1, **sides, "rows": size, "columns": inner.out_channels}
        output = Value.of_image(one.name, self.shapes[one.name])
        self.add(Step("transpose", "Transpose", one.name, fields, [convolved], output))

    def classify(self, one: Operation, layer: nn.Linear) -> None:
        if len(one.shape) != 1:
            raise _refusal(one, "only whole feature vectors can be classified")
        image, finish = self.value(one.inputs[0]), _Finish(one.name, layer.out_features)
        finish.multiply_add(None, layer.bias)
        self.follow(finish)
        shape = _shape((layer.in_features, 1, 1), (layer.out_features, 1, 1), 1, 1, 0)
        self.convolve_numbers(one.name, shape, linear_weights(layer, image.shape), image, finish)

    def convolve_numbers(
        self, name: str, shape: dict[str, Field], weights: dict[str, Field], image: Value, finish: _Finish
    ) -> Value:
        sizes = cast(dict[str, int], shape | weights)
        width, channels = sizes["out_width"], sizes["out_channels"]
        maps = channels // sizes["planes"]
        scratch = [
            Value("totals", width * channels),
            Value("sums", width * maps) if "modulation" in weights else None,
            Value("decoded", DECODED * maps) if "codes" in weights else None,
        ]
        return self.finish("convolve", "Convolution", name, {"shape": shape, **weights}, image, finish, scratch)

    def pool(self, one: Operation, image: Value) -> Value:
        output = Value.of_image(one.name, (image.shape[0], *self.shapes[one.name][1:]))
        function = "pool_max" if isinstance(one.module, nn.MaxPool2d | WholeMaxPool) else "pool_average"
        fields = _shape(image.shape, output.shape, *_windows(one))
        self.add(Step(function, "Shape", one.name, fields, [image], output))
        return output

    def finish_image(self, one: Operation) -> None:
        """Batch norm, sum or PReLU where no convolution is in front of it."""
        image = self.value(one.inputs[0])
        finish = _Finish(one.inputs[0], image.shape[0])
        if one.module is None:
            self.value(one.inputs[1])
        self.take_in(one, finish)
        self.follow(finish)
        fields: dict[str, Field] = {"channels": image.shape[0], "pixels": image.shape[1] * image.shape[2]}
        self.finish("finish_image", "Pointwise", one.name, fields, image, finish, [Value("pixel", image.shape[0])])

    # What is behind a convolution.

    def follow(self, finish: _Finish, may_pool: bool = False) -> None:
        """Take the operations behind a step into it, as long as nothing else uses what is between them."""
        while len(self.users[finish.end]) == 1 and finish.negative is None:
            (one,) = self.users[finish.end]
            if type(one.module) is FrozenBatchNorm2d and any(self.is_sign(user.name) for user in self.users[one.name]):
                return  # signs are taken of what is in front of it
            is_free = finish.shortcut is None and finish.pool is None
            if may_pool and is_free and type(one.module) is nn.AvgPool2d:
                finish.pool, finish.end = one, one.name
                self.fused.add(one.name)
            elif not self.take_in(one, finish):
                return

    def take_in(self, one: Operation, finish: _Finish) -> bool:
        """Take the next operation into a step; return whether it can be."""
        module = one.module
        if type(module) is FrozenBatchNorm2d:
            if finish.shortcut is not None:
                return False
            finish.multiply_add(module.scale, module.shift)
        elif module is None:
            other = one.inputs[one.inputs[0] == finish.end]
            if finish.shortcut is not None or other not in self.values:
                return False
            finish.shortcut = self.values[other]
        elif type(module) is TwoSlopePReLU:
            finish.positive, finish.negative = module.positive, module.negative
        elif type(module) in _PRELUS:
            slopes = module.weight if type(module) is nn.PReLU else torch.zeros(1)
            if len(slopes) not in (1, finish.channels):
                raise _refusal(one, f"it has {len(slopes)} slopes for {finish.channels} channels")
            finish.negative = slopes.expand(finish.channels)
        else:
            return False
        finish.end = one.name
        self.fused.add(one.name)
        return True

    def finish(
        self,
        function: str,
        struct: str,
        name: str,
        fields: dict[str, Field],
        image: Value,
        finish: _Finish,
        scratch: list[Value | None],
    ) -> Value:
        shape = image.shape
        if "shape" in fields:
            sizes = cast(dict[str, int], fields["shape"])
            shape = (sizes["out_channels"], sizes["out_height"], sizes["out_width"])
        output, shortcut = Value.of_image(finish.end, shape), finish.shortcut
        if shortcut is not None and shortcut.shape != shape:
            raise InputError(f"{finish.end} cannot be translated to C: it adds images of different shapes")
        may_overwrite = [image] if "shape" not in fields else []
        may_overwrite += [shortcut] if shortcut is not None and shortcut is not image else []
        fields = {**fields, "finish": finish.fields()}
        self.add(Step(function, struct, name, fields, [image, shortcut], output, scratch, may_overwrite))
        return output


def _finish_of(name: str, layer: _Convolution) -> _Finish:
    """What belongs to a convolution itself: its scale, unless its weights have it, and its bias."""
    finish = _Finish(name, layer.out_channels)
    finish.multiply_add(layer.scale if type(layer) is FrozenConv2d else None, layer.bias)
    return finish


def _square(one: Operation, layer: _Convolution) -> tuple[int, int, int]:
    """Kernel size, stride, and padding on the left of a convolution that is the same along both sides."""
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise _refusal(one, f"its padding mode is {layer.padding_mode!r}, not 'zeros'")
    if layer.dilation != (1, 1):
        raise _refusal(one, "it is dilated")
    size, stride = layer.kernel_size, layer.stride
    padding = layer.padding
    if isinstance(padding, str):
        padding = (0, 0) if padding == "valid" else ((size[0] - 1) // 2, (size[1] - 1) // 2)
    if any(first != second for first, second in (size, stride, padding)):
        raise _refusal(one, "its kernel, stride and padding must be the same along both sides")
    return size[0], stride[0], padding[0]


def _windows(one: Operation) -> tuple[int, int, int]:
    """Size, stride and padding of a pool; 0, 0, 0 if its windows share out the image."""
    module = one.module
    if isinstance(module, nn.AdaptiveAvgPool2d | WholeMaxPool):
        return 0, 0, 0
    assert isinstance(module, nn.MaxPool2d | nn.AvgPool2d)
    sizes = (module.kernel_size, module.stride, module.padding)
    size, stride, padding = (side[0] if isinstance(side, tuple) and len(set(side)) == 1 else side for side in sizes)
    if isinstance(size, tuple) or isinstance(stride, tuple) or isinstance(padding, tuple):
        raise _refusal(one, "its windows must be the same along both sides")
    if isinstance(module, nn.MaxPool2d):
        if module.dilation not in (1, (1, 1)) or module.return_indices:
            raise _refusal(one, "it is dilated, or returns indices")
    elif module.divisor_override is not None or (padding and module.count_include_pad):
        raise _refusal(one, "its mean is not that of the pixels inside the image")
    return size, stride, padding


def _shape(inside: Shape, outside: Shape, kernel: int, stride: int, padding: int) -> dict[str, Field]:
    names = ("channels", "height", "width")
    sizes: dict[str, Field] = {f"in_{name}": side for name, side in zip(names, inside, strict=True)}
    sizes |= {f"out_{name}": side for name, side in zip(names, outside, strict=True)}
    return sizes | {"kernel": kernel, "stride": stride, "padding": padding}


def _refusal(one: Operation, why: str) -> InputError:
    return InputError(f"{one.name} ({type(one.module).__name__}) cannot be translated to C: {why}")
