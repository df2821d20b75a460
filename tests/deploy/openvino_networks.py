"""Networks for the tests of OpenVINO, and what it makes of them."""

from collections import OrderedDict
from types import SimpleNamespace

import torch
from agreement import assert_agree
from torch import nn
from trained_networks import IMAGE_SHAPE

from pcnn_lightning.deploy import Description, PackedNetwork, compile_openvino, freeze


def layers_of(*layers, shape, seed=0):
    """A packed network of a few layers with random numbers, whose logits are all outputs of the last one."""
    generator = torch.Generator().manual_seed(seed)
    for module in nn.Sequential(*layers).modules():
        for values in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if values.dtype == torch.int8:
                places = torch.randint(len(module.symbols), values.shape, generator=generator)
                values.copy_(places * module.symbols.step + module.symbols.start)
            else:
                values.data.normal_(generator=generator)
    features = freeze(nn.Sequential(OrderedDict(zip("abcdefgh", layers, strict=False))))
    with torch.no_grad():
        count = features(torch.zeros(1, *shape)).numel()
    network = SimpleNamespace(features=features, classifier=nn.Flatten())
    fields = {"mean": (0.5,) * shape[0], "std": (0.25,) * shape[0], "image_size": shape[1:], "in_channels": shape[0]}
    description = Description(
        family="PCNN", stage="binary", backbone="wrn7", num_classes=count, layer={"scaling": "layer"}, **fields
    )
    return PackedNetwork(network, description).eval()


def binary_convolutions(model):
    return sum(node.get_type_name() == "BinaryConvolution" for node in model.get_ops())


def raw_images(batch, shape=IMAGE_SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=generator)


def agree(network, images, classifier=None):
    classifier = classifier or compile_openvino(network)
    return assert_agree(network, images, classifier.classify(images), classifier.logits(images))
