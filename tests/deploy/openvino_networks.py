"""Networks for the tests of OpenVINO, and what it makes of them."""

import torch
from agreement import assert_agree
from trained_networks import IMAGE_SHAPE

from pcnn_lightning.deploy import compile_openvino


def binary_convolutions(model):
    return sum(node.get_type_name() == "BinaryConvolution" for node in model.get_ops())


def raw_images(batch, shape=IMAGE_SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=generator)


def agree(network, images, classifier=None):
    classifier = classifier or compile_openvino(network)
    return assert_agree(network, images, classifier.classify(images), classifier.logits(images))
