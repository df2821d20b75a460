"""Freezing: converts a trained network to a network for inference.

A frozen network has the modules of the trained one under the same names, with four exceptions: each 1-bit layer is
replaced by its inference layer (:meth:`QuantizedConv2d.frozen`), ``nn.BatchNorm2d`` by :class:`FrozenBatchNorm2d`,
1-bit activations with thresholds by a batch norm and a sign, activations that are not enabled by the identity or the
ReLU that they are, and dropout, also of whole blocks, by the identity. Another runtime can walk the modules and read
everything it needs from their attributes.
"""

import copy

import torch
from torch import nn

from pcnn_lightning.layers import FrozenBatchNorm2d, FrozenConv2d, QuantizedConv2d, SignActivation


def freeze(network: nn.Module) -> nn.Module:
    """Convert a trained network, which is not changed, to a network for inference.

    The logits are those of the trained network in evaluation mode, up to rounding (on a CPU, bit for bit). The frozen
    network behaves the same in both modes, has no latent weights and needs no gradients. Freezing a frozen network
    copies it.

    Args:
        network: any module, such as ``model.net`` of a trained model; it need not have 1-bit layers.

    Raises:
        ValueError: if a 1-bit layer holds non-finite values or its inference layer has different kernels, or a batch
            norm has no running statistics.
    """
    return _freeze(copy.deepcopy(network)).eval().requires_grad_(False)


def _freeze(module: nn.Module) -> nn.Module:
    """Return the frozen counterpart of ``module``, replacing its children in place."""
    if isinstance(module, QuantizedConv2d):
        return _freeze_layer(module)
    if isinstance(module, SignActivation) and not module.enabled:
        return nn.ReLU() if module.replaces_relu else nn.Identity()
    if isinstance(module, SignActivation) and module.threshold is not None:
        return module.frozen()
    if isinstance(module, nn.BatchNorm2d):
        return _freeze_norm(module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_batches_tracked = None  # it counts batches of training
    if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in ("StochasticDepth", "DropPath"):
        return nn.Identity()
    for name, child in module._modules.items():
        if child is not None:
            setattr(module, name, _freeze(child))
    return module


def _freeze_norm(module: nn.BatchNorm2d) -> nn.Module:
    frozen = FrozenBatchNorm2d.of(module)
    if type(module).forward is nn.BatchNorm2d.forward:
        return frozen
    if type(module).__name__ == "BatchNormAct2d":  # timm's, which goes on with an activation
        return nn.Sequential(frozen, module.drop, module.act)  # type: ignore[arg-type]
    raise ValueError(f"{type(module).__name__} has a forward method of its own, and cannot be frozen")


def _freeze_layer(layer: QuantizedConv2d) -> FrozenConv2d:
    if not all(values.isfinite().all() for values in (*layer.parameters(), *layer.buffers())):
        raise ValueError("a layer to freeze must be finite, but holds NaN or infinite values")
    frozen = layer.frozen()
    # Signs and scales cannot represent arbitrary kernels, and the layer may be user-defined.
    if not torch.equal(frozen.quantized_weight(), layer.quantized_weight()):
        raise ValueError(
            f"{type(layer).__name__} cannot be frozen: its kernels are not signs with scaling {layer.scaling!r}. "
            "Set its scaling, or override frozen()"
        )
    return frozen
