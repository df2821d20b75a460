"""The contract that every 1-bit convolution fulfils, and the layer that is left of one for inference."""

from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcnn_lightning.checks import check_bool, check_choice, check_integer, pair_of
from pcnn_lightning.functional.binary import Scaling

Padding = tuple[int, int] | Literal["valid", "same"]


class Storage(NamedTuple):
    """Number of parameters that a layer stores for inference, by the bits each one takes."""

    at_1_bit: int = 0
    at_2_bits: int = 0
    at_32_bits: int = 0


class Convolution2d(nn.Module):
    """Shape and arguments of a convolution, shared by trained and frozen layers.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output.
        kernel_size: an integer or a pair.
        stride: an integer or a pair.
        padding: an integer, a pair, ``"valid"`` or ``"same"``; the input is padded with zeros, also if it holds signs.
        dilation: an integer or a pair.
        groups: number of groups that the channels are divided into, a divisor of ``in_channels`` and ``out_channels``.
        bias: whether to add a bias to the output.

    Attributes:
        bias: (out_channels,), at first 0; None without a bias.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_integer(name, count, 1)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = pair_of("kernel_size", kernel_size, 1), pair_of("stride", stride, 1)
        self.dilation = pair_of("dilation", dilation, 1)
        if isinstance(padding, str):
            check_choice("padding", padding, ("valid", "same"))
            if padding == "same" and self.stride != (1, 1):
                raise ValueError(f"padding 'same' needs stride 1, but got stride {self.stride}")
            self.padding: Padding = padding
        else:
            self.padding = pair_of("padding", padding, 0)
        check_integer("groups", groups, 1)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels={in_channels} and out_channels={out_channels}, but got {groups}"
            )
        self.groups = groups
        check_bool("bias", bias)
        self.register_buffer("bias", torch.zeros(out_channels) if bias else None)

    @property
    def shape(self) -> tuple[int, int, tuple[int, int], tuple[int, int], Padding, tuple[int, int], int, bool]:
        """The arguments above, in their order."""
        sizes = self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation
        return *sizes, self.groups, self.bias is not None

    @property
    def groups_and_bias(self) -> dict[str, int]:
        """``groups`` and ``bias``, each unless it is the default."""
        return ({"groups": self.groups} if self.groups > 1 else {}) | ({} if self.bias is None else {"bias": True})

    def convolve(self, x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve (B, in_channels, H, W) with ``kernels`` (out_channels, in_channels / groups, kh, kw)."""
        return F.conv2d(x, kernels, bias, self.stride, self.padding, self.dilation, self.groups)

    def convolve_scaled(self, x: Tensor, signs: Tensor, scale: Tensor | None) -> Tensor:
        """Convolve with signs, then multiply by the scale, then add the bias.

        Sums of signs are whole numbers, exact in any order, so that every runtime gets the same bits.
        """
        y = self.convolve(x, signs)
        y = y if scale is None else y * scale
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}"
        ) + "".join(f", {name}={value}" for name, value in self.groups_and_bias.items())


class QuantizedConv2d(Convolution2d):
    """Base class of 1-bit convolutions: quantizes its latent weights C and convolves with the result.

    A subclass implements :meth:`quantize`. Everything else has a default that suits a plain binary layer, whose
    kernels are signs times a scale, and is what the rest of the package asks a layer for: its second parameter, its
    stages, its unquantized kernels, its storage, its inference layer, the filters to draw, and the hooks that a
    training loop calls.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output, a multiple of ``groups * planes``.
        kernel_size: an integer or a pair.
        stride: an integer or a pair.
        padding: an integer, a pair, ``"valid"`` or ``"same"``.
        dilation: an integer or a pair.
        groups: number of groups that the channels are divided into; ``in_channels`` makes a depthwise convolution.
        bias: whether to add a learned bias to the output.
        planes: number of kernels made from each latent one. They yield adjacent output channels, so it must divide
            ``out_channels / groups`` for all of them to convolve the same input channels.

    Attributes:
        weight: C, (out_channels / planes, in_channels / groups, kh, kw).
        bias: (out_channels,), at first 0; None without a bias.
        stage: the stage that the layer is in, one of :attr:`stages`.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    second_parameter: ClassVar[str | None] = None
    """Name of the parameter learned at η₂; None if the layer has no other parameter than ``weight``."""
    loss_name: ClassVar[str | None] = None
    """Name of the quantization loss in the logs; None if the layer has none."""
    planes_name: ClassVar[str] = "planes"
    """Name of ``planes`` in error messages."""
    filter_symbol: ClassVar[str] = "D"
    """Symbol of what :meth:`filters` returns."""
    stages: tuple[str, ...] = ("real", "binary")
    """The stages that the layer can be in, in training order: it begins in the last one."""
    scaling: Scaling = "channel"
    """Whether kernels are signs times one scale per ``"layer"``, per ``"channel"`` or no scale (``"none"``)."""
    convolves_signs: bool = True
    """Whether kernels are signs times a scale, so that XNOR and popcount can convolve an input of signs."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        planes: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        check_integer(self.planes_name, planes, 1)
        if out_channels // groups % planes:
            outputs = f"out_channels={out_channels}" + (f" / groups={groups}" if groups > 1 else "")
            raise ValueError(f"{self.planes_name} must divide {outputs}, but got {planes}")
        self.planes, self.stage = planes, self.stages[-1]
        self.weight = nn.Parameter(torch.empty(out_channels // planes, in_channels // groups, *self.kernel_size))
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias)
        self._loss_of_forward: tuple[Tensor | None, tuple[Tensor | None, ...]] | None = None  # and its parameters
        nn.init.kaiming_normal_(self.weight)

    def reset_parameters(self) -> None:
        """Draw all parameters again: C as He et al., for the fan-in of the kernels that convolve; the bias is 0."""
        nn.init.kaiming_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @abstractmethod
    def quantize(self) -> tuple[Tensor, Tensor | None]:
        """The 1-bit kernels, (out_channels, in_channels / groups, kh, kw), and the weighted loss of quantizing them."""
        raise NotImplementedError(f"{type(self).__name__} must implement quantize()")

    def unquantized(self) -> tuple[Tensor, Tensor | None]:
        """In stage ``real``, what :meth:`quantize` returns in the others; the loss is 0 or None."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        loss = None if self.loss_name is None else self.weight.new_zeros((), dtype=dtype)
        return self.weight.repeat_interleave(self.planes, 0), loss

    def kernels(self) -> tuple[Tensor, Tensor | None]:
        """The kernels to convolve with in the current stage, and the weighted loss."""
        return self.unquantized() if self.stage == "real" else self.quantize()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, H, W), as :func:`torch.nn.functional.conv2d` does.

        Raises:
            ValueError: if the input does not have ``in_channels`` channels.
        """
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"expected an input of shape (B, {self.in_channels}, H, W), but got {tuple(x.shape)}: "
                f"this layer has in_channels={self.in_channels}"
            )
        kernels, loss = self.kernels()
        if (self.training or self.couples_gradients) and torch.is_grad_enabled() and not _within_backward():
            # Kept for quantization_loss(): its gradient may need what flows back through these very kernels.
            self._loss_of_forward = (loss, self._own_parameters())
        if self.training or not self.convolves_signs or self.stage == "real":
            return self.convolve(x, kernels, self.bias)
        scale = self._scale_of(kernels)
        return self.convolve_scaled(x, kernels / scale, scale[:, 0])

    @property
    def couples_gradients(self) -> bool:
        """Whether the gradient of the quantization loss depends on what flows back through the kernels of its pass."""
        return False

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """The kernels that convolve, (out_channels, in_channels / groups, kh, kw), detached."""
        return self.kernels()[0].clone()

    def quantization_loss(self) -> Tensor | None:
        """The weighted loss of quantizing the kernels (3.42 or 3.18): a scalar, at least float32; None without one.

        After a forward pass in training mode, or one that couples gradients, it belongs to that pass and is handed out
        once. Otherwise it is computed from the current parameters.
        """
        if self._loss_of_forward is None or not torch.is_grad_enabled():
            return self.kernels()[1]
        (loss, parameters), self._loss_of_forward = self._loss_of_forward, None
        return self.kernels()[1] if self._is_over(loss, parameters) else loss

    # Stages and inference.

    @property
    def levels(self) -> int:
        """Number of values that an element of a kernel can have, scales aside."""
        return 3 if self.stage == "ternary" else 2

    def set_stage(self, stage: str) -> None:
        """Go to another of the layer's :attr:`stages`.

        Raises:
            ValueError: if the layer has no such stage.
        """
        check_choice("stage", stage, self.stages)
        self.stage = stage
        self.forget_forward()

    @classmethod
    def empty_frozen(cls, *shape: Any, stage: str, planes: int = 1, **options: Any) -> "FrozenConv2d":
        """An inference layer of this kind whose numbers are still to be loaded, as from a packed file.

        Args:
            shape: the arguments of :class:`Convolution2d`.
            stage: the stage of the trained layer.
            planes: number of kernels made from each latent one; an ordinary inference layer stores all of them.
            options: :attr:`FrozenConv2d.options` of the layer.

        Raises:
            ValueError: in stage ``real``, whose kernels are not of 1 bit.
        """
        if stage == "real":
            raise ValueError(f"{cls.__name__} has no 1-bit kernels in stage real: train on to {cls.stages[-1]}")
        return FrozenConv2d(*shape, levels=3 if stage == "ternary" else 2, **options)

    @torch.no_grad()
    def frozen(self) -> "FrozenConv2d":
        """The layer for inference, without latent weights.

        Raises:
            ValueError: in stage ``real``, whose kernels are not of 1 bit.
        """
        layer = self.empty_frozen(*self.shape, stage=self.stage, scaling=self.scaling).to(self.weight.device)
        kernels = self.quantized_weight()
        # Binary kernels of scale 0 are all 0, whatever their signs.
        signs = kernels.sign() if layer.levels == 3 else 1.0 - 2.0 * (kernels < 0)
        layer.signs = signs.to(torch.int8)
        if layer.scale is not None:
            layer.scale = _largest(kernels, self.scaling).reshape(layer.scale.shape)
        layer.bias = None if self.bias is None else self.bias.clone()
        return layer

    def storage(self) -> Storage:
        """Number of parameters stored for inference, by the bits each one takes."""
        if self.stage == "real":
            return Storage(at_32_bits=sum(parameter.numel() for parameter in self.parameters()))
        return self.frozen().storage()

    @torch.no_grad()
    def filters(self) -> Tensor:
        """The filters to draw over training, (n, kh, kw): here the first input channel of up to eight kernels."""
        return self.quantized_weight()[:8, 0].clone()

    # Hooks that a training loop calls. In a simple loop, none of them is needed.

    def begin_training(self, split_updates: bool) -> None:
        """Called before training. ``split_updates``: several batches or processes contribute to one update."""

    def begin_epoch(self) -> None:
        """Called before the first batch of each epoch."""

    def before_step(self) -> None:
        """Called before each optimizer step, when gradients are complete and unscaled."""

    def pending(self) -> dict[str, Tensor]:
        """State of an unfinished update, apart from gradients, to be saved in a checkpoint."""
        return {}

    def restore_pending(self, pending: dict[str, Tensor]) -> None:
        """Restore what :meth:`pending` returned."""

    # The loss of a forward pass.

    def forget_forward(self) -> None:
        """Drop the loss of the last forward pass, because the parameters or the stage have changed."""
        self._loss_of_forward = None

    def _own_parameters(self) -> tuple[Tensor | None, ...]:
        return () if torch.compiler.is_compiling() else tuple(self._parameters.values())

    def _is_over(self, loss: Tensor | None, parameters: tuple[Tensor | None, ...]) -> bool:
        """Whether a kept loss is of a transform of torch.func that has ended, or of parameters that it put in place."""
        if loss is None or torch.compiler.is_compiling():
            return False
        others = any(kept is not own for kept, own in zip(parameters, self._own_parameters(), strict=False))
        return others or torch._C._functorch.is_dead_tensor_wrapper(loss)  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> "QuantizedConv2d":
        self.forget_forward()  # a loss that nobody asked for would keep its graph alive
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # Tensors between forward and backward cannot be copied and are no part of a copy.
        return {**self.__dict__, "_loss_of_forward": None}

    def _scale_of(self, kernels: Tensor) -> Tensor:
        """Scale of the kernels, (1, 1, 1, 1) or (out_channels, 1, 1, 1); 1 for kernels that are all zero."""
        largest = _largest(kernels.detach(), self.scaling)
        return torch.where(largest > 0, largest, 1.0)


class FrozenConv2d(Convolution2d):
    """A 1-bit convolution for inference: ``conv2d(x, signs) * scale + bias``. It has buffers only, and no parameters.

    It sums signs and multiplies by the scale once, as trained layers do in evaluation mode. Sums of signs are whole
    numbers and exact in any order: convolution and popcount yield the same bits.

    Args:
        levels: 2 for signs in {-1, 1}, 3 for {-1, 0, 1}.
        scaling: one scale per ``"layer"``, per output ``"channel"``, or ``"none"``.

    The other arguments are those of :class:`Convolution2d`.

    Attributes:
        signs: (out_channels, in_channels / groups, kh, kw) int8.
        scale: a scalar, or (out_channels, 1, 1), or None.
        symbols: the values that an element of the int8 buffer can have, in the order of their codes in packed files.
        options: keyword arguments of :meth:`QuantizedConv2d.empty_frozen`, apart from those of :class:`Convolution2d`,
            ``stage`` and ``planes``.
    """

    symbols: range
    signs: Tensor | None
    scale: Tensor | None

    def __init__(self, *args: Any, levels: int = 2, scaling: Scaling = "layer", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if levels not in (2, 3):
            raise ValueError(f"levels must be 2 or 3, but got {levels!r}")
        check_choice("scaling", scaling, get_args(Scaling))
        self.levels: int | None = levels
        self.options: dict[str, Any] = {"scaling": scaling}
        self.symbols = range(-1, 2, 2) if levels == 2 else range(-1, 2)
        signs = torch.ones(self.out_channels, self.in_channels // self.groups, *self.kernel_size, dtype=torch.int8)
        scale = torch.ones((self.out_channels, 1, 1) if scaling == "channel" else ())
        self.register_buffer("signs", signs)
        self.register_buffer("scale", None if scaling == "none" else scale)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, H, W)."""
        assert self.signs is not None
        return self.convolve_scaled(x, self.signs.to(x.dtype), self.scale)

    def quantized_weight(self) -> Tensor:
        """The kernels that convolve, (out_channels, in_channels / groups, kh, kw)."""
        assert self.signs is not None
        if self.scale is None:
            return self.signs.float()
        return self.signs.to(self.scale.dtype) * self.scale.reshape(-1, 1, 1, 1)

    def storage(self) -> Storage:
        """Number of parameters stored, by the bits each one takes in a packed file."""
        counts = [0, 0, 0]
        for buffer in self.buffers():
            counts[2 if buffer.is_floating_point() else len(self.symbols) > 2] += buffer.numel()
        return Storage(*counts)

    def extra_repr(self) -> str:
        options = {"levels": self.levels, **self.options}
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in options.items())])


def _within_backward() -> bool:
    """Whether a backward pass is running, in which activation checkpointing repeats a pass whose loss is known."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _largest(kernels: Tensor, scaling: Scaling) -> Tensor:
    """Largest magnitude of all kernels, (1, 1, 1, 1), or of each, (out_channels, 1, 1, 1); 1 without scales."""
    if scaling == "none":
        return kernels.new_ones(1, 1, 1, 1)
    return kernels.abs().amax(dim=(1, 2, 3) if scaling == "channel" else (0, 1, 2, 3), keepdim=True)


def one_bit_layers(network: nn.Module) -> dict[str, QuantizedConv2d]:
    """The 1-bit convolutions of a network in registration order, by their names in it."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantizedConv2d)}
