"""Deployment of trained networks: freezing, packing at one bit per sign, export and fast runtimes, without Lightning.

To label an image with a packed file::

    import numpy as np
    import torch
    from PIL import Image
    from pcnn_lightning.deploy import load_packed

    network = load_packed("digits.safetensors")
    height, width = network.description.image_size
    image = Image.open("image.png").convert("L").resize((width, height))  # "RGB" for color images
    pixels = torch.from_numpy(np.array(image)).reshape(1, height, width, -1).permute(0, 3, 1, 2)
    label = network.classify(pixels).item()
    print(network.description.class_names[label])
"""

from pcnn_lightning.deploy.c import CompiledNetwork as CompiledNetwork
from pcnn_lightning.deploy.c import compile_c as compile_c
from pcnn_lightning.deploy.c import save_c as save_c
from pcnn_lightning.deploy.description import Description as Description
from pcnn_lightning.deploy.export import save_onnx as save_onnx
from pcnn_lightning.deploy.export import save_torch as save_torch
from pcnn_lightning.deploy.freeze import freeze as freeze
from pcnn_lightning.deploy.openvino import OpenVINOClassifier as OpenVINOClassifier
from pcnn_lightning.deploy.openvino import compile_openvino as compile_openvino
from pcnn_lightning.deploy.openvino import save_openvino as save_openvino
from pcnn_lightning.deploy.packed import PackedNetwork as PackedNetwork
from pcnn_lightning.deploy.packed import load_packed as load_packed
from pcnn_lightning.deploy.packed import save_packed as save_packed
