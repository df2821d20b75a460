"""Exports frozen networks as programs that do not need this package.

Both formats take raw images, ``images`` (B, C, H, W) uint8, of the size that the network was trained for and in batches
of any size, normalize them, and return ``logits`` (B, num_classes) float32. Both store the int8 buffers of the frozen
network as int8, one byte per sign, and the description as JSON under the name ``pcnn_lightning``:

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
"""Maximum number of elements of a constant that is folded when an ONNX graph is simplified: enough for shapes, too few
for signs, which would be stored as floats."""


def save_onnx(network: nn.Module, path: str | os.PathLike[str], description: Description) -> None:
    """Write a network as an ONNX model, atomically.

    Args:
        network: a network that ``description`` describes, trained or frozen.
        path: the file to write.
        description: description of the network.

    Raises:
        InputError: if the description is of another network, a value is not finite, the file cannot be written, or the
            packages onnx and onnxscript are not installed.
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
    ClearMetadataAndDocStringPass()(program.model)  # of each node, as in save_torch
    program.model.metadata_props[_KEY] = json.dumps(description.as_dict())
    write_whole(Path(path), program.model_proto.SerializeToString())


def save_torch(network: nn.Module, path: str | os.PathLike[str], description: Description) -> None:
    """Write a network as a ``torch.export`` program, atomically.

    Args:
        network: a network that ``description`` describes, trained or frozen.
        path: the file to write.
        description: description of the network.

    Raises:
        InputError: if the description is of another network, a value is not finite, or the file cannot be written.
    """
    module, images = _to_trace(network, description)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))
    program.example_inputs = None
    for node in program.graph.nodes:  # metadata of each node: source lines and their paths
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
    """The module to export, and two images to trace it with: with one, the batch size would be taken as fixed."""
    module = _FromPixels(PackedNetwork.of(network, description)).eval()
    return module, torch.zeros(2, description.in_channels, *description.image_size, dtype=torch.uint8)
