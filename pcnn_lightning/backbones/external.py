"""Networks of torchvision, of timm and of the user, as features and a linear classifier."""

import difflib
import importlib
import re
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from pcnn_lightning.backbones.blocks import Network
from pcnn_lightning.checks import check_integer
from pcnn_lightning.conversion import ConversionReport, convert
from pcnn_lightning.conversion.trace import evaluate, trace
from pcnn_lightning.errors import InputError

LIBRARIES = ("torchvision", "timm")
"""Libraries whose networks are named ``library/network``."""
ACTIVATIONS = ("real", "sign", "threshold")
"""Inputs of 1-bit layers: real, their signs, or their signs beyond a learned threshold for each channel."""


class SplitNetwork(Network):
    """A network whose last layer is linear, as features and a classifier.

    Args:
        network: the network; its last linear layer is replaced by the identity.
        image_shape: (C, H, W) of an image that it can process.

    Attributes:
        features: the network without its last layer, from images (B, C, H, W) to features (B, feature_dim).
        classifier: the last layer.

    Raises:
        InputError: if the output of the last linear layer is not that of the network.
    """

    features: nn.Module  # type: ignore[assignment]

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        nn.Module.__init__(self)
        linear = [one for one in trace(network, image_shape) if isinstance(one.module, nn.Linear) and one.calls]
        if not linear:
            raise InputError(
                f"{type(network).__name__} has no linear layer; its last one must map the features to the logits"
            )
        last = linear[-1]
        image = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(last.module.weight)
        before = evaluate(network, image)
        if not isinstance(before, Tensor):
            raise InputError(f"{type(network).__name__} must return logits, but returns a {type(before).__name__}")
        network.set_submodule(last.name, nn.Identity())
        self.features, self.classifier = network, cast(nn.Linear, last.module)
        after = evaluate(self, image)
        if before.shape != after.shape or not (before.is_meta or torch.equal(before, after)):
            raise InputError(
                f"the logits of {type(network).__name__} must be the output of its last linear layer, {last.name}"
            )


def external_network(
    name: str,
    num_classes: int,
    in_channels: int,
    *,
    pretrained: bool | str = False,
    small_images: bool = False,
) -> nn.Module:
    """Build a network of another library.

    Its first convolution is replaced if ``in_channels`` is not 3, with the same response to gray images, and its last
    linear layer if it does not have ``num_classes`` outputs. Networks of timm are adapted by timm.

    Args:
        name: ``torchvision/resnet18``, ``timm/resnet18d`` and the like.
        num_classes: number of classes.
        in_channels: number of channels of the images.
        pretrained: whether to download the library's weights; or a file with the weights of this network.
        small_images: whether a ResNet begins with a 3×3 convolution with stride 1 and without pooling, as for CIFAR.

    Raises:
        InputError: names what is wrong, and what is allowed.
    """
    check_integer("num_classes", num_classes, 1)
    check_integer("in_channels", in_channels, 1)
    library, _, own = name.partition("/")
    if library == "torchvision":
        network, channels = _of_torchvision(own, pretrained), 3
    elif library == "timm":
        network, channels = _of_timm(own, num_classes, in_channels, pretrained), in_channels
    else:
        raise InputError(f"backbone: {name}: the library must be one of {', '.join(LIBRARIES)}, but got {library}")
    layers = [one for one in trace(network, (channels, 224, 224)) if one.calls]
    convolution = next((one for one in layers if isinstance(one.module, nn.Conv2d)), None)
    linear = next((one for one in reversed(layers) if isinstance(one.module, nn.Linear)), None)
    if convolution is None or linear is None:
        raise InputError(f"backbone: {name} needs a convolution and a linear layer")
    last = cast(nn.Linear, linear.module)
    if last.out_features != num_classes:
        network.set_submodule(linear.name, nn.Linear(last.in_features, num_classes, last.bias is not None))
    if small_images or channels != in_channels:
        if type(convolution.module) is not nn.Conv2d:
            kind = type(convolution.module).__name__
            raise InputError(f"backbone: the first convolution of {name} is a {kind}, which cannot be replaced")
        network.set_submodule(convolution.name, _stem(convolution.module, in_channels, small_images))
    if small_images:
        if not isinstance(getattr(network, "maxpool", None), nn.Module):
            raise InputError(f"small_images needs a ResNet, whose pooling it leaves out, but backbone is {name}")
        network.maxpool = nn.Identity()
    return network


def published_shape(name: str) -> tuple[int, int]:
    """Number of classes and of channels that the pretrained weights of a network of another library are for.

    Args:
        name: ``torchvision/resnet18``, ``timm/resnet18d`` and the like.

    Raises:
        InputError: if there is no such network, or it has no pretrained weights.
    """
    library, _, own = name.partition("/")
    if library == "torchvision":
        from torchvision import models  # takes a second to import

        _check_torchvision(own)
        return len(models.get_model_weights(own).DEFAULT.meta["categories"]), 3
    timm = _import_timm(own)
    try:
        about = timm.get_pretrained_cfg(own, allow_unregistered=False)
    except RuntimeError as error:
        raise InputError(f"{name} has no pretrained weights: {error}") from error
    return about.num_classes, about.input_size[0]


def _stem(old: nn.Conv2d, in_channels: int, small_images: bool) -> nn.Conv2d:
    size, stride, padding = ((3, 3), (1, 1), (1, 1)) if small_images else (old.kernel_size, old.stride, old.padding)
    new = nn.Conv2d(in_channels, old.out_channels, size, stride, padding, bias=old.bias is not None)  # type: ignore[arg-type]
    if size == old.kernel_size:
        with torch.no_grad():  # the response to a gray image stays the same
            new.weight.copy_(old.weight.sum(dim=1, keepdim=True) / in_channels)
            if new.bias is not None and old.bias is not None:
                new.bias.copy_(old.bias)
    return new


def _of_torchvision(name: str, pretrained: bool | str) -> nn.Module:
    from torchvision import models  # takes a second to import

    _check_torchvision(name)
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of GoogLeNet and Inception, about their initial weights
            network = builder(weights="DEFAULT" if pretrained is True else None)
    except (urllib.error.URLError, OSError) as error:
        raise _no_download(f"torchvision/{name}", error) from error
    if isinstance(pretrained, str):
        try:
            network.load_state_dict(_read_weights(pretrained))
        except RuntimeError as error:
            raise _does_not_fit(pretrained, error) from error
    if getattr(network, "aux_logits", False):  # auxiliary classifiers, whose logits would come as well
        network.aux_logits = False  # type: ignore[assignment]
        for part in ("aux1", "aux2", "AuxLogits"):
            if hasattr(network, part):
                setattr(network, part, None)
    return network


def _check_torchvision(name: str) -> None:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise InputError(f"backbone: torchvision has no {name}; it has {', '.join(models.list_models(module=models))}")


def _of_timm(name: str, num_classes: int, in_channels: int, pretrained: bool | str) -> nn.Module:
    timm = _import_timm(name)
    own = {"state_dict": _read_weights(pretrained), "source": ""} if isinstance(pretrained, str) else None
    shape = {"num_classes": num_classes, "in_chans": in_channels}
    try:
        network = timm.create_model(name, pretrained=bool(pretrained), pretrained_cfg_overlay=own, **shape)
        return cast(nn.Module, network)
    except Exception as error:  # of the hub, which has many
        if isinstance(pretrained, str):
            raise _does_not_fit(pretrained, error) from error
        if pretrained:
            raise _no_download(f"timm/{name}", error) from error
        raise


def _import_timm(name: str) -> Any:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise InputError(f"backbone: timm/{name} needs timm: pip install '.[timm]'") from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 10)
        raise InputError(f"backbone: timm has no {name}; names like it are {', '.join(close) or 'none'}")
    return timm


def _no_download(name: str, error: Exception) -> InputError:
    return InputError(
        f"the weights of {name} cannot be downloaded ({type(error).__name__}): download them elsewhere, and name the "
        "file as pretrained; for a teacher, load them in a function of your own"
    )


def _read_weights(path: str) -> dict[str, Tensor]:
    """Read a file of weights, without running code from it."""
    if not Path(path).is_file():
        raise InputError(f"pretrained must be true, false or a file of weights, but there is no file {path}")
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return cast(dict[str, Tensor], state.get("state_dict", state))
    except Exception as error:  # a damaged file can fail anywhere
        raise _does_not_fit(path, error) from error


def _does_not_fit(path: str, error: Exception) -> InputError:
    said = re.sub(r"\x1b\[\d*m", "", " ".join(str(error).split()))
    return InputError(f"pretrained: {path} does not fit: {said[:300]}")


def users_network(path: str, num_classes: int, in_channels: int) -> nn.Module:
    """Call a function of the user, ``package.module.function``, with ``num_classes`` and ``in_channels``.

    Raises:
        InputError: if there is no such function, or it does not return a module.
    """
    place, _, name = path.rpartition(".")
    try:
        if not place:
            raise ImportError("it names no package")
        build = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"network: {path} cannot be imported ({error}): it must be package.function") from error
    try:
        network = build(num_classes=num_classes, in_channels=in_channels)
    except Exception as error:  # whatever the function does
        raise InputError(
            f"network: {path}(num_classes={num_classes}, in_channels={in_channels}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(f"network: {path} must return a torch.nn.Module, but returned {type(network).__name__}")
    return network.float()


def quarter_resnet18(num_classes: int, in_channels: int) -> nn.Module:
    """Torchvision's ResNet-18 with 16 to 128 channels, for small images: an example of a network of one's own."""
    from torchvision.models.resnet import BasicBlock, ResNet

    network: Any = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    network.inplanes = 16
    network.conv1, network.bn1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    network.maxpool = nn.Identity()
    for index, channels in enumerate((16, 32, 64, 128)):
        layer = network._make_layer(BasicBlock, channels, 2, stride=1 if index == 0 else 2)
        setattr(network, f"layer{index + 1}", layer)
    network.fc = nn.Linear(128, num_classes)
    return cast(nn.Module, network)


def front_of(activations: str, sign: Callable[..., nn.Module]) -> Callable[..., nn.Module] | None:
    """What :func:`~pcnn_lightning.conversion.convert` puts in front of 1-bit layers, for one of :data:`ACTIVATIONS`.

    ``off`` puts an identity there: for a network trained with its signs disabled, whose modules keep their names.
    """
    return {"real": None, "off": lambda **_: nn.Identity(), "sign": lambda **_: sign(), "threshold": sign}[activations]


def converted_network(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    convolution: Callable[..., nn.Module] | None,
    **options: Any,
) -> tuple[SplitNetwork, ConversionReport | None]:
    """Convert a network, unless ``convolution`` is None, and split it into features and classifier.

    Args:
        network: the network; it is changed.
        image_shape: (C, H, W) of an image that it can process.
        convolution: makes a 1-bit layer from the arguments of ``nn.Conv2d``.
        options: other arguments of :func:`pcnn_lightning.conversion.convert`.
    """
    report = None if convolution is None else convert(network, convolution, image_shape=image_shape, **options)
    return SplitNetwork(network, image_shape), report
