"""A trained network can leave by ONNX as it is (a packed one is yet to come)."""

import warnings

import numpy as np
import pytest
import torch
from tiny import fit, tiny_digits, tiny_pcnn
from torch import nn

from pcnn_lightning import SignActivation

onnxruntime = pytest.importorskip("onnxruntime")


def export(net, images, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1)
        torch.onnx.export(net, (images,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    return onnxruntime.InferenceSession(path)


def run(session, images):
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})


@pytest.mark.slow
def test_no_sign_flips_and_the_same_logits(tmp_path):
    """With random batch-norm statistics: on fresh ones, values at zero padding are exact ties of the sign."""
    torch.manual_seed(0)
    model = tiny_pcnn(in_channels=3, stages=[4, 4, 8, 8]).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.weight.data, layer.bias.data):
                tensor.normal_()
            layer.running_var.uniform_(0.5, 2)

    class WithSigns(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model.net
            self.signs = []
            for layer in self.net.modules():
                if isinstance(layer, SignActivation):
                    layer.register_forward_hook(lambda layer, inputs, output: self.signs.append(output))

        def forward(self, images):
            self.signs.clear()
            return self.net(images), *self.signs

    network = WithSigns()
    session = export(network, torch.randn(2, 3, 32, 32), str(tmp_path / "x.onnx"))
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        logits, *signs = network(images)
    theirs, *their_signs = run(session, images)
    assert len(signs) == 3
    assert sum(int((ours.numpy() != other).sum()) for ours, other in zip(signs, their_signs, strict=True)) == 0
    np.testing.assert_allclose(theirs, logits.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_same_labels_on_digits_after_training(tmp_path):
    model = tiny_pcnn(stages=[4, 4, 8, 16], projections=4)
    data = tiny_digits(train_size=1000, image_size=16, batch_size=32)
    fit(model, data, max_epochs=3)
    model.eval()
    batches = [data.on_after_batch_transfer(raw, 0)[0] for raw in data.test_dataloader()]
    images = torch.cat(batches)
    session = export(model.net, images[:2], str(tmp_path / "x.onnx"))
    (theirs,) = run(session, images)
    with torch.no_grad():
        ours = model(images)
    assert (ours.argmax(1).numpy() == theirs.argmax(1)).all()
