"""Trained networks as they leave: frozen, and packed at one bit a sign. Lightning is not needed.

Ten lines without Lightning, which label images by a packed file::

    import numpy as np
    import torch
    from PIL import Image
    from pcnn_lightning.deploy import load_packed

    network = load_packed("network.safetensors")
    height, width = network.description.image_size
    image = Image.open("image.png").convert("RGB").resize((width, height))  # "L" for a network of grey images
    pixels = torch.from_numpy(np.array(image)).reshape(1, height, width, -1).permute(0, 3, 1, 2)
    label = network.classify(pixels).item()
    print(network.description.class_names[label])
"""

from pcnn_lightning.deploy.description import Description
from pcnn_lightning.deploy.export import save_onnx, save_torch
from pcnn_lightning.deploy.freeze import freeze
from pcnn_lightning.deploy.layers import (
    FrozenBatchNorm2d,
    FrozenConv2d,
    FrozenModulatedConv2d,
    FrozenProjectionConv2d,
)
from pcnn_lightning.deploy.packed import PackedNetwork, is_packed, load_packed, save_packed
from pcnn_lightning.deploy.runtime import accelerate

__all__ = [
    "Description",
    "FrozenBatchNorm2d",
    "FrozenConv2d",
    "FrozenModulatedConv2d",
    "FrozenProjectionConv2d",
    "PackedNetwork",
    "accelerate",
    "freeze",
    "is_packed",
    "load_packed",
    "save_onnx",
    "save_packed",
    "save_torch",
]
