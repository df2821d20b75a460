"""One layer beside an ordinary convolution and, where they are installed, beside other libraries' binary ones."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from pcnn_lightning.benchmark.measure import Report, Round, Setting, Stopwatch, compare_rounds
from pcnn_lightning.errors import InputError, compile_failed
from pcnn_lightning.layers import ProjectionConv2d, QuantizedConv2d, SignActivation
from pcnn_lightning.modules import OneBitClassifier


def benchmark_layer(
    model: OneBitClassifier, name: str, image_shape: tuple[int, int, int], batch_size: int, setting: Setting
) -> Report:
    """Time a 1-bit layer of ``model``, forward and backward on an input of the size that it has in the network.

    A projection layer is timed with the sign of its input and with its projection loss, a modulated one with its filter
    loss. Binary convolutions of other libraries binarise their input as well.

    Args:
        model: whose layer it is.
        name: of the layer in ``model.net``.
        image_shape: (C, H, W) of the images that the network is given.
        batch_size: B.
        setting: where and how.

    Raises:
        InputError: if there is no such layer.
    """
    layers = {found: part for found, part in model.net.named_modules() if isinstance(part, QuantizedConv2d)}
    if name not in layers:
        known = f"one of {', '.join(layers)}" if layers else "left out: this network has no 1-bit layers"
        raise InputError(f"layer must be {known}, but got {name!r}")
    layer, device = layers[name], setting.device
    x = torch.randn(_input_shape(model.net, layer, image_shape, batch_size), device=device)
    contenders: dict[str, nn.Module] = {type(layer).__name__: _Ours(layer, model), "nn.Conv2d": _make(nn.Conv2d, layer)}
    if isinstance(layer, ProjectionConv2d):
        contenders |= {peer: make(layer) for peer, make in PEERS.items() if find_spec(peer) is not None}
    passes = {}
    for contender, module in contenders.items():
        module.to(device, memory_format=setting.memory_format).train()  # type: ignore[call-overload]
        if setting.compiled:
            module.compile()
        passes[contender] = _pass(module, x.contiguous(memory_format=setting.memory_format), setting)
    kernel, shape = ("×".join(map(str, sizes)) for sizes in (layer.kernel_size, x.shape))
    what = f"{name}, {layer.in_channels}→{layer.out_channels}, {kernel} on {shape}"
    return compare_rounds(what, batch_size, passes, setting)


class _Ours(nn.Module):
    """A layer with the sign of its input, where it has one, whose loss is part of what is gone back through."""

    def __init__(self, layer: QuantizedConv2d, model: OneBitClassifier) -> None:
        super().__init__()
        projecting = isinstance(layer, ProjectionConv2d)
        self.sign = SignActivation(model.hparams["activation_gradient"]) if projecting else nn.Identity()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(self.sign(x)), self.layer.quantization_loss()


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
    shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return kind(*shape, bias=False, **options)


def _bitorch(layer: QuantizedConv2d) -> nn.Module:
    from bitorch.layers import QConv2d

    return _make(QConv2d, layer, input_quantization="sign", weight_quantization="sign")


def _brevitas(layer: QuantizedConv2d) -> nn.Module:
    from brevitas.nn import QuantConv2d, QuantIdentity
    from brevitas.quant import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst

    sign = QuantIdentity(act_quant=SignedBinaryActPerTensorConst)
    return nn.Sequential(sign, _make(QuantConv2d, layer, weight_quant=SignedBinaryWeightPerTensorConst))


PEERS: dict[str, Callable[[QuantizedConv2d], nn.Module]] = {"bitorch": _bitorch, "brevitas": _brevitas}
"""Binary convolutions of other libraries, by the name of what is to be installed."""


@torch.no_grad()
def _input_shape(
    network: nn.Module, layer: QuantizedConv2d, image_shape: tuple[int, int, int], batch_size: int
) -> tuple[int, ...]:
    shapes: list[torch.Size] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    network.eval()(torch.zeros(1, *image_shape))
    handle.remove()
    return (batch_size, *shapes[0][1:])
