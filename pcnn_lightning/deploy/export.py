"""Frozen networks as programs that need nothing of this package.

Both kinds take raw images, ``images`` (B, C, H, W) uint8, of the size that the network was trained for and as many as
one likes, normalise them, and answer ``logits`` (B, num_classes) float32. Both store what is int8 in the frozen network
as int8, a byte a sign, and the description as JSON under the name ``pcnn_lightning``:

==================  ================================================================================================
ONNX                ``onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["pcnn_lightning"]``
``torch.export``    ``torch.export.load(path, extra_files=files)``, which fills ``files = {"pcnn_lightning": ""}``
==================  ================================================================================================
"""

import io
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from pcnn_lightning.deploy.description import Description
from pcnn_lightning.deploy.packed import PackedNetwork
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole

_KEY = "pcnn_lightning"
_LARGEST_FOLDED = 4
"""Numbers in a constant that is computed with when an ONNX graph is simplified: enough for shapes, too few for signs,
which would come out as floats."""


def save_onnx(network: nn.Module, path: str | os.PathLike[str], description: Description) -> None:
    """Write a network as an ONNX model, whole or not at all.

    Args:
        network: a network of a registered backbone, trained or frozen.
        path: the file to write.
        description: what the network is.

    Raises:
        InputError: if the description is of another network, a number is not finite, the file cannot be written, or
            the packages onnx and onnxscript are not installed.
    """
    try:
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
        from onnxscript import optimizer
    except ImportError as error:
        raise InputError(f"ONNX needs packages that are not installed here ({error}): pip install '.[onnx]'") from error
    module, images = _to_trace(network, description)
    program = torch.onnx.export(
        module,
        (images,),
        dynamic_shapes=({0: "batch"},),
        input_names=["images"],
        output_names=["logits"],
        optimize=False,
        verbose=False,
    )
    assert program is not None
    optimizer.optimize(program.model, input_size_limit=_LARGEST_FOLDED)
    ClearMetadataAndDocStringPass()(program.model)  # of each node, as below
    program.model.metadata_props[_KEY] = json.dumps(description.as_dict())
    write_whole(Path(path), program.model_proto.SerializeToString())


def save_torch(network: nn.Module, path: str | os.PathLike[str], description: Description) -> None:
    """Write a network as a ``torch.export`` program, whole or not at all.

    Args:
        network: a network of a registered backbone, trained or frozen.
        path: the file to write.
        description: what the network is.

    Raises:
        InputError: if the description is of another network, a number is not finite, or the file cannot be written.
    """
    module, images = _to_trace(network, description)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))
    program.example_inputs = None
    for node in program.graph.nodes:  # of each node: lines of code, and the folders they lie in
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(name, None)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={_KEY: json.dumps(description.as_dict())})
    write_whole(Path(path), content.getbuffer())


class _FromPixels(nn.Module):
    """A packed network that takes raw images."""

    def __init__(self, network: PackedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.network.preprocess(images))
        return logits


def _to_trace(network: nn.Module, description: Description) -> tuple[nn.Module, Tensor]:
    """What is exported, and two images to trace it with: of a single one, the batch would be taken for fixed."""
    module = _FromPixels(PackedNetwork.of(network, description)).eval()
    return module, torch.zeros(2, description.in_channels, *description.image_size, dtype=torch.uint8)
