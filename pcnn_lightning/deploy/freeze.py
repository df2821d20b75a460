"""A trained network as a plain network for inference.

A frozen network has the modules of the trained one under the same names, with three kinds in the place of others:

====================  =========================================================================================
``ProjectionConv2d``  :class:`FrozenProjectionConv2d`: signs of D and a scale
``ModulatedConv2d``   :class:`FrozenModulatedConv2d`: signs (U = 3, 4: codes) of Ĉ, a scale (U values) and M-Filters
``nn.BatchNorm2d``    :class:`FrozenBatchNorm2d`: a scale and a shift for each channel
====================  =========================================================================================

Convolutions of full precision, linear layers, PReLUs, sign activations and pools stay what they are, so that another
runtime can walk the modules and read all that it needs from their attributes.
"""

import copy

from torch import nn

from pcnn_lightning.deploy.layers import FrozenBatchNorm2d, FrozenModulatedConv2d, FrozenProjectionConv2d
from pcnn_lightning.layers import ModulatedConv2d, ProjectionConv2d


def freeze(network: nn.Module) -> nn.Module:
    """Make a network for inference of a trained one, which stays as it is.

    Its logits are those of the trained network in evaluation mode, to float rounding (on a CPU, bit for bit). Batch
    norms and dropout are gone, so that its mode makes no difference, and nothing in it asks for a gradient. A frozen
    network frozen again is a copy.

    Args:
        network: a trained network, such as ``model.net`` of a ``PCNN`` or an ``MCN``: any module with 1-bit layers in
            it, or with none.

    Raises:
        ValueError: if a 1-bit layer is not finite, or a batch norm has no running statistics.
    """
    return _freeze(copy.deepcopy(network)).eval().requires_grad_(False)


def _freeze(module: nn.Module) -> nn.Module:
    """Freeze ``module``, in place but for itself."""
    if isinstance(module, ProjectionConv2d):
        return FrozenProjectionConv2d.of(module)
    if isinstance(module, ModulatedConv2d):
        return FrozenModulatedConv2d.of(module)
    if isinstance(module, nn.BatchNorm2d):
        return FrozenBatchNorm2d.of(module)
    if isinstance(module, nn.Dropout):
        return nn.Identity()
    for name, child in module._modules.items():
        if child is not None:
            setattr(module, name, _freeze(child))
    return module
