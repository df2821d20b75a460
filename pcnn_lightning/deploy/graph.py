"""A frozen network as a list of operations, which the exporters to other runtimes translate one by one."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pcnn_lightning.backbones.mcn import PlaneConv
from pcnn_lightning.errors import InputError


@dataclass(frozen=True)
class Operation:
    """One step of a network.

    Attributes:
        name: path of its module, such as ``features.stage1.0.conv``, or ``features.stage1.0.add`` for a sum.
        module: what computes it; None for the sum of its inputs.
        inputs: names of the operations that it takes; the image is ``image``.
        shape: shape of the output for one image, such as (C, H, W) or (classes,).
    """

    name: str
    module: nn.Module | None
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


class _Proxy(fx.Proxy):
    """A value that tells ``x += y``, which overwrites x, from ``x + y``."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, _: str) -> bool:
        return isinstance(module, PlaneConv) or not list(module.children())


@torch.no_grad()
def operations(network: nn.Module, image_shape: tuple[int, int, int]) -> list[Operation]:
    """The operations of a frozen network in evaluation mode, in the order that they are computed in.

    Args:
        network: the network, as :func:`pcnn_lightning.deploy.freeze` returns it.
        image_shape: (C, H, W) of a normalized image.

    Raises:
        InputError: if the network is more than modules and sums.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever a forward method does with a proxy
        raise InputError(f"the network cannot be exported as a list of layers: {error}") from error
    names: dict[fx.Node, str] = {}
    storage: dict[fx.Node, fx.Node] = {}  # the node that made the values of a node which passes them on
    values: dict[str, Tensor] = {"image": torch.zeros(1, *image_shape, dtype=torch.float32)}
    found: list[Operation] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = "image"
            continue
        if node.op == "output":
            continue
        if node.op == "get_attr" or not node.all_input_nodes:
            raise InputError(f"the network cannot be exported: {node.format_node()} is neither a module nor a sum")
        inputs = tuple(names[argument] for argument in node.all_input_nodes)
        if node.op == "call_module":
            name, module = str(node.target), network.get_submodule(str(node.target))
            output = module(*(values[one] for one in inputs))
        elif (function := _module_of(node)) is not None:
            name, module = f"{_scope(inputs)}{node.name}", function
            output = module(values[inputs[0]])
        elif node.target in (operator.add, operator.iadd, torch.add) and _is_sum(node):
            inputs = tuple(names[argument] for argument in node.args)
            name, module = f"{_scope(inputs)}add", None
            output = values[inputs[0]] + values[inputs[1]]
        else:
            raise InputError(f"the network cannot be exported: {node.format_node()} is neither a module nor a sum")
        while name in values:  # a module that is called twice
            name += "_again"
        names[node], values[name] = name, output
        source = storage.get(node.all_input_nodes[0], node.all_input_nodes[0])
        if _is_in_place(node, module):  # whoever reads the input from now on, reads the result
            names |= {one: name for one in names if storage.get(one, one) is source}
            storage[node] = source
        elif isinstance(module, (nn.Identity, nn.Flatten)):
            storage[node] = source
        found.append(Operation(name, module, inputs, tuple(output.shape[1:])))
    return found


def _is_sum(node: fx.Node) -> bool:
    return len(node.args) == 2 and not node.kwargs and all(isinstance(one, fx.Node) for one in node.args)


def _is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation overwrites its first input."""
    if node.op == "call_module":
        return getattr(module, "inplace", False) is True
    in_place = node.target in ("relu_", "add_", operator.iadd, torch.relu_)
    return in_place or node.kwargs.get("inplace", False) is True or (node.target is F.relu and True in node.args[1:])


def _module_of(node: fx.Node) -> nn.Module | None:
    """The module that computes what a function call does; None if there is none."""
    target, (_, *args), kwargs = node.target, node.args, node.kwargs
    if target in RELUS and args in ([], [True], [False]) and kwargs.keys() <= {"inplace"}:
        return nn.ReLU()
    if target in (torch.flatten, "flatten") and args in ([1], [1, -1]) and not kwargs:
        return nn.Flatten()
    if target is F.adaptive_avg_pool2d and args in ([1], [(1, 1)]) and not kwargs:
        return nn.AdaptiveAvgPool2d(1)
    return None


def _scope(inputs: tuple[str, ...]) -> str:
    """The path, with a trailing dot, of the module that holds the first input, which is the convolution's."""
    return inputs[0].rpartition(".")[0] + "."
