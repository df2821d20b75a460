"""Replacing the convolutions of a network by 1-bit convolutions."""

import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from pcnn_lightning.checks import check_bool
from pcnn_lightning.conversion.report import ConversionReport, ConvertedLayer
from pcnn_lightning.conversion.trace import Layer, Traced, pass_image, recheck_pooled, trace
from pcnn_lightning.errors import InputError
from pcnn_lightning.layers import FrozenConv2d, ProjectionConv2d, QuantizedConv2d

Patterns = str | Sequence[str] | None
"""Paths of layers, patterns of paths such as ``layer1.*``, or regular expressions such as ``re:layer[12]\\..*``."""

SHORTCUT = re.compile(r"(^|[._])(downsample|shortcut|skip|identity)([._\d]|$)")
"""Names of shortcuts in the networks of torchvision, timm and this package."""


def convert(
    model: nn.Module,
    layer: Callable[..., nn.Module] = ProjectionConv2d,
    *,
    activation: Callable[..., nn.Module] | None = None,
    image_shape: tuple[int, int, int] = (3, 224, 224),
    include: Patterns = None,
    exclude: Patterns = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    pointwise: bool = False,
) -> ConversionReport:
    """Replace convolutions of a network by 1-bit convolutions, in place.

    Without ``include``, the first convolution, 1×1 convolutions and grouped ones, depthwise included, stay real, as do
    linear layers. The latent weights of a 1-bit layer start from the weights of the convolution, so that a pretrained
    network keeps what it has learned; with J or K planes, from those of every J-th kernel. Biases are kept, and weights
    and biases that were not to be trained stay so.

    Args:
        model: any network, whose class, methods and other modules stay as they are.
        layer: makes a 1-bit layer from the arguments of ``nn.Conv2d``: a class such as ``ProjectionConv2d``, or a
            ``functools.partial`` of one.
        activation: makes the module in front of each 1-bit layer, called with ``threshold``, the number of its input
            channels, and ``name``. :class:`SignActivation` makes activations 1-bit as well, with a learned threshold
            for each channel, since what a ReLU has left is all of one sign. None leaves activations real.
        image_shape: (C, H, W) of an image that passes through the network once, for the order of its layers.
        include: the convolutions to convert, whatever they are; an empty list for none.
        exclude: convolutions that stay real.
        overrides: arguments of ``layer`` by pattern; the last pattern that fits wins.
        pointwise: whether 1×1 convolutions are converted as well, except shortcuts and those on pooled features, as in
            squeeze-and-excitation.

    Returns:
        What became of each layer.

    Raises:
        ValueError: if no convolution can be converted, a pattern matches none, or a convolution that was asked for
            cannot be converted. The network is unchanged then.
        TypeError: if ``include``, ``exclude`` or ``overrides`` is of another type.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2))
        >>> report = convert(network, image_shape=(3, 6, 6))
        >>> type(network[2]).__name__, f"{report.share_of_macs:.2f}"
        ('ProjectionConv2d', '0.40')
    """
    if isinstance(model, Layer):
        raise InputError("the network is a single layer: put it into an nn.Sequential to convert it")
    check_bool("pointwise", pointwise)
    traced = trace(model, image_shape)
    recheck_pooled(model, image_shape, traced)
    reasons = _reasons(traced, _patterns("include", include), _patterns("exclude", exclude), pointwise)
    chosen = {one.name: one for one in traced if reasons[one.name] is None}
    options = _overrides(chosen, overrides or {})
    # All are built before the first is put into its place, so that an error changes nothing.
    built = {name: _built(one, layer, options[name], activation) for name, one in chosen.items()}
    _put(model, {path: built[name] for name, one in chosen.items() for path in one.names})
    try:
        _check_called(model, built, image_shape)
    except InputError:
        _put(model, {path: one.module for one in chosen.values() for path in one.names})
        raise
    report = ConversionReport([_described(one, reasons[one.name]) for one in traced])
    if include is None and report.share_of_convolution_weights < 0.5:
        left = Counter(one.reason for one in report.layers if one.is_convolution and not one.is_converted)
        warnings.warn(
            f"only {report.share_of_convolution_weights:.0%} of the weights of convolutions became 1-bit; what stayed "
            f"real: {_counted(left)}",
            stacklevel=2,
        )
    return report


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)


def _check_called(model: nn.Module, built: Mapping[str, nn.Module], image_shape: tuple[int, int, int]) -> None:
    """Require that the network calls the new layers, and not the old ones by a reference of its own."""
    called: set[nn.Module] = set()
    try:
        pass_image(model, image_shape, list(built.values()), lambda module, *_: called.add(module))
    except InputError as error:
        raise InputError(f"the network cannot work with 1-bit layers in place of its convolutions: {error}") from error
    if left := [name for name, module in built.items() if module not in called]:
        raise InputError(f"{left[0]} cannot become 1-bit: the network calls it by a reference that is no submodule")


def _reasons(
    traced: Sequence[Traced], include: Sequence[str] | None, exclude: Sequence[str] | None, pointwise: bool
) -> dict[str, str | None]:
    """Why each layer stays real, by name; None for those to convert.

    Raises:
        ValueError: if a pattern matches nothing, or a layer that was asked for cannot be converted.
    """
    convolutions = [one for one in traced if not isinstance(one.module, nn.Linear)]
    if not convolutions:
        raise ValueError("the network has no convolution")
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(_matches(pattern, one.name) for one in convolutions):
                within = any(one.name.startswith(f"{pattern}.") for one in convolutions)
                names = f"{pattern}.* for those in it" if within else ", ".join(one.name for one in convolutions)
                raise ValueError(f"{argument}: {pattern!r} matches no convolution; there are {names}")
    reasons: dict[str, str | None] = {}
    weights = Counter(id(weight) for weight in (one.module.weight for one in traced))
    for one in traced:
        if isinstance(one.module, nn.Linear):
            reasons[one.name] = "linear"
        elif exclude is not None and any(_matches(pattern, one.name) for pattern in exclude):
            reasons[one.name] = "excluded"
        elif include is None:
            reasons[one.name] = _obstacle(one, weights) or _convention(one, one is convolutions[0], pointwise)
        elif not any(_matches(pattern, one.name) for pattern in include):
            reasons[one.name] = "not included"
        elif obstacle := _obstacle(one, weights):
            raise ValueError(f"{one.name} cannot become 1-bit: {obstacle}")
        else:
            reasons[one.name] = None
    if include is None and all(reasons.values()):
        left = Counter(reasons[one.name] for one in convolutions)
        raise ValueError(f"no convolution became 1-bit: {_counted(left)}. Name those to convert by include")
    return reasons


def _obstacle(one: Traced, weights: Mapping[int, int]) -> str | None:
    """Why a convolution cannot be converted at all; None if it can. ``weights`` counts the layers that have each."""
    module = one.module
    kind = type(module)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return "transposed"
    if not isinstance(module, nn.Conv2d):
        return f"{kind.__name__}, not Conv2d"
    own = (kind.forward, kind._conv_forward) != (nn.Conv2d.forward, nn.Conv2d._conv_forward)  # type: ignore[union-attr]
    if own or "forward" in vars(module):
        return f"{kind.__name__} has a forward method of its own"
    if hasattr(module, "parametrizations") or module._forward_pre_hooks or module._forward_hooks:
        return "its weight or output is computed by a parametrization or hook"
    if module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode}"
    if weights[id(module.weight)] > 1:
        return "it shares its weight with another layer"
    if not one.calls:
        return "no image passes through it"
    if one.calls > 1:
        return f"an image passes through it {one.calls} times"
    return None


def _convention(one: Traced, is_first: bool, pointwise: bool) -> str | None:
    """Why a convolution stays real by convention; None if it does not."""
    module = one.module
    assert isinstance(module, nn.Conv2d)
    if is_first:
        return "the first convolution"
    if module.groups > 1:
        return "depthwise" if module.groups == module.in_channels else "grouped"
    if module.kernel_size == (1, 1):
        if SHORTCUT.search(one.name):
            return "1×1 shortcut"
        if one.is_pooled:
            return "1×1 on pooled features"
        return None if pointwise else "1×1 (pointwise)"
    return None


def _built(
    one: Traced,
    layer: Callable[..., nn.Module],
    options: Mapping[str, Any],
    activation: Callable[..., nn.Module] | None,
) -> nn.Module:
    """The 1-bit layer for a convolution, with its weight and bias, and what goes in front of it."""
    old = one.module
    assert isinstance(old, nn.Conv2d)
    if given := sorted({"in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"} & set(options)):
        raise InputError(f"{one.name}: {given[0]} is taken from the convolution and cannot be overridden")
    shape = (old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation)
    try:
        new = layer(*shape, groups=old.groups, bias=old.bias is not None, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{one.name}: {error}") from error
    if not isinstance(new, (QuantizedConv2d, FrozenConv2d)):
        raise InputError(f"layer must make 1-bit convolutions, but made a {type(new).__name__}")
    new.to(old.weight)
    if isinstance(new, QuantizedConv2d):  # else it is an inference layer, whose numbers are still to be loaded
        _take_weights(new, old)
    new.train(old.training)
    if activation is None:
        return new
    front = activation(threshold=old.in_channels, name=one.name).to(old.weight)
    return nn.Sequential(OrderedDict(activation=front, conv=new)).train(old.training)


@torch.no_grad()
def _take_weights(new: QuantizedConv2d, old: nn.Conv2d) -> None:
    new.weight.copy_(old.weight[:: new.planes])
    new.weight.requires_grad_(old.weight.requires_grad)
    if new.bias is not None and old.bias is not None:
        new.bias.copy_(old.bias)
        new.bias.requires_grad_(old.bias.requires_grad)


def _overrides(chosen: Mapping[str, Traced], overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    if not isinstance(overrides, Mapping) or not all(isinstance(options, Mapping) for options in overrides.values()):
        raise TypeError(f"overrides must be arguments by pattern, but got {overrides!r}")
    for pattern in _patterns("overrides", list(overrides)) or ():
        if not any(_matches(pattern, name) for name in chosen):
            raise ValueError(f"overrides: {pattern!r} matches no converted layer; there are {', '.join(chosen)}")
    found: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for name, options in found.items():
        for pattern, given in overrides.items():
            if _matches(pattern, name):
                options.update(given)
    return found


def _described(one: Traced, reason: str | None) -> ConvertedLayer:
    module = one.module
    is_convolution = not isinstance(module, nn.Linear)
    kind = type(module).__name__
    if is_convolution:
        kind += " " + "×".join(map(str, module.kernel_size))  # type: ignore[arg-type]
    return ConvertedLayer(one.name, kind, reason, module.weight.numel(), one.macs, is_convolution)


def _patterns(argument: str, given: Patterns) -> Sequence[str] | None:
    patterns = [given] if isinstance(given, str) else given
    if patterns is not None and not (isinstance(patterns, Sequence) and all(isinstance(one, str) for one in patterns)):
        raise TypeError(f"{argument} must be a pattern or a list of patterns, but got {given!r}")
    for pattern in patterns or ():
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"{argument}: {pattern!r} is no regular expression: {error}") from error
    return patterns


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def _counted(reasons: Mapping[str | None, int]) -> str:
    return ", ".join(f"{count} × {reason}" for reason, count in reasons.items())
