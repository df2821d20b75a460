"""Benchmark of a layer against an ordinary convolution and binary convolutions of other libraries."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from pcnn_lightning.errors import InputError, compile_failed
from pcnn_lightning.layers import QuantizedConv2d, SignActivation
from pcnn_lightning.modules import OneBitClassifier
from pcnn_lightning.reports.benchmark.measure import Report, Round, Setting, Stopwatch, compare_rounds


def benchmark_layer(
    model: OneBitClassifier, name: str, image_shape: tuple[int, int, int], batch_size: int, setting: Setting
) -> Report:
    """Time a 1-bit layer of ``model``, forward and backward, on an input of the same size as in the network.

    The layer is timed with its quantization loss. If its input is binarized in the network, the sign activation is
    timed as well, and binary convolutions of other libraries are included if they are installed.

    Args:
        model: the model that contains the layer.
        name: path of the layer in ``model.net``.
        image_shape: (C, H, W) of the images.
        batch_size: B.
        setting: where and how to time.

    Raises:
        InputError: if there is no such layer.
    """
    layers = model.one_bit_layers
    if name not in layers:
        known = f"one of {', '.join(layers)}" if layers else "left out: this network has no 1-bit layers"
        raise InputError(f"layer must be {known}, but got {name!r}")
    layer, device = layers[name], setting.device
    seen = _input_of(model.net, layer, image_shape)
    x = torch.randn(batch_size, *seen.shape[1:], dtype=seen.dtype, device=device)
    sign = _sign_of(model.net) if bool((seen.abs() == 1).all()) else nn.Identity()
    contenders: dict[str, nn.Module] = {"nn.Conv2d": _make(nn.Conv2d, layer), type(layer).__name__: _Ours(layer, sign)}
    if isinstance(sign, SignActivation):
        contenders |= {peer: make(layer) for peer, make in PEERS.items() if find_spec(peer) is not None}
    passes = {}
    for contender, module in contenders.items():
        module.to(device, x.dtype, memory_format=setting.memory_format).train()  # type: ignore[call-overload]
        if setting.compiled:
            module.compile()
        passes[contender] = _pass(module, x.contiguous(memory_format=setting.memory_format), setting)
    kernel, shape = ("×".join(map(str, sizes)) for sizes in (layer.kernel_size, x.shape))
    what = f"{name}, {layer.in_channels}→{layer.out_channels}, {kernel} on {shape}"
    return compare_rounds(what, batch_size, passes, setting)


class _Ours(nn.Module):
    """A layer with its sign activation and its quantization loss, if it has them."""

    def __init__(self, layer: QuantizedConv2d, sign: nn.Module) -> None:
        super().__init__()
        self.sign, self.layer = sign, layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        output, loss = self.layer(self.sign(x)), self.layer.quantization_loss()
        return (output,) if loss is None else (output, loss)


def _pass(module: nn.Module, x: Tensor, setting: Setting) -> Round:
    x = x.detach().requires_grad_()
    gradients: list[Tensor] = []

    def once(watch: Stopwatch) -> None:
        watch.start()
        try:
            with setting.autocast():
                found = module(x)
        except TorchDynamoException as error:
            raise compile_failed(error) from error
        outputs = found if isinstance(found, tuple) else (found,)
        watch.mark("forward")
        if not gradients:
            gradients.extend(torch.ones_like(output) for output in outputs)
        torch.autograd.backward(outputs, gradients)
        watch.mark("backward")
        module.zero_grad()
        x.grad = None

    return once


def _make(kind: Callable[..., nn.Module], layer: QuantizedConv2d, **options: Any) -> nn.Module:
    *shape, groups, bias = layer.shape
    return kind(*shape, groups=groups, bias=bias, **options)


def _bitorch(layer: QuantizedConv2d) -> nn.Module:
    from bitorch.layers import QConv2d

    return _make(QConv2d, layer, input_quantization="sign", weight_quantization="sign")


def _brevitas(layer: QuantizedConv2d) -> nn.Module:
    from brevitas.nn import QuantConv2d, QuantIdentity
    from brevitas.quant import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst

    sign = QuantIdentity(act_quant=SignedBinaryActPerTensorConst)
    return nn.Sequential(sign, _make(QuantConv2d, layer, weight_quant=SignedBinaryWeightPerTensorConst))


PEERS: dict[str, Callable[[QuantizedConv2d], nn.Module]] = {"bitorch": _bitorch, "brevitas": _brevitas}
"""Binary convolutions of other libraries, by package name."""


@torch.no_grad()
def _input_of(network: nn.Module, layer: QuantizedConv2d, image_shape: tuple[int, int, int]) -> Tensor:
    """The input of ``layer`` for one random image."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    network.eval()(torch.randn(1, *image_shape, dtype=next(network.parameters()).dtype))
    handle.remove()
    return inputs[0]


def _sign_of(network: nn.Module) -> SignActivation:
    """A copy of a sign activation of the network."""
    return copy.deepcopy(next(module for module in network.modules() if isinstance(module, SignActivation)))
