"""The PCNN module."""

import pytest
import torch
from tiny import fit, tiny_digits, tiny_pcnn
from torch import nn
from torch.nn import functional as F

from pcnn_lightning import ProjectionConv2d


def test_training_equals_a_manual_loop():
    """A manual loop with two SGD optimizers, autograd for 3.61 and the same batches."""
    model = tiny_pcnn(stage="ternary", projection_loss_weight=0.01, center_loss_weight=0.01, label_smoothing=0.1)
    twin = tiny_pcnn(stage="ternary", projection_loss_weight=0.01)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("_terms.")})
    fit(model, tiny_digits(), max_epochs=2)

    data = tiny_digits()
    data.setup("fit")
    layers = [layer for layer in twin.modules() if isinstance(layer, ProjectionConv2d)]
    matrices = [layer.projection for layer in layers]
    others = [p for p in twin.parameters() if all(p is not matrix for matrix in matrices)]
    kernels = torch.optim.SGD(others, 0.05, momentum=0.9, nesterov=True, weight_decay=3e-4)
    projections = torch.optim.SGD(matrices, 0.01, momentum=0.9, nesterov=True)
    centers = torch.zeros(10, 4)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for raw in loader:
            images, labels = data.on_after_batch_transfer(raw, 0)
            features = twin.net.features(images)
            loss = F.cross_entropy(twin.net.classifier(features), labels, label_smoothing=0.1)
            loss = loss + sum(layer.quantization_loss() for layer in layers)
            loss = loss + 0.005 * (features - centers[labels]).square().sum()
            kernels.zero_grad()
            projections.zero_grad()
            loss.backward()
            kernels.step()
            projections.step()
            for label in labels.unique():
                of_class = features.detach()[labels == label]
                step = (centers[label] - of_class).sum(0) / (1 + len(of_class))
                centers[label] -= 0.5 * step
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(model.terms["center_loss"].centers, centers, rtol=1e-4, atol=1e-5)


def test_logged_metrics():
    trainer = fit(tiny_pcnn(center_loss_weight=1e-3))
    assert set(trainer.callback_metrics) == {
        *(f"train/{name}" for name in ("loss", "cross_entropy", "projection_loss", "center_loss", "accuracy")),
        *(f"val/{name}" for name in ("loss", "cross_entropy", "projection_loss", "center_loss", "accuracy")),
        "lr/kernels",
        "lr/projections",
        "stage",
    }


def test_the_full_precision_twin_has_the_same_widths_and_no_projection():
    ours = tiny_pcnn(projections=4)
    twin = ours.twin()
    shapes = [layer.quantized_weight().shape for layer in ours.one_bit_layers.values()]
    assert [m.weight.shape for m in twin.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)][
        1:
    ] == shapes
    assert not twin.one_bit_layers
    assert {**twin.hparams} == {**ours.hparams, "full_precision": True}
    trainer = fit(twin)
    assert twin.stage == "full_precision"
    assert not {"train/projection_loss", "lr/projections"} & set(trainer.callback_metrics)


def test_every_layer_of_a_trained_binary_network_holds_two_values():
    model = tiny_pcnn()
    fit(model)
    for layer in model.one_bit_layers.values():
        scale = layer.weight.abs().mean()
        assert torch.equal(layer.quantized_weight().unique(), torch.stack([-scale, scale]).detach())


def test_center_loss_can_start_with_the_binary_stage():
    waiting = tiny_pcnn(center_loss_weight=0.1, center_loss_start="binary", stage="ternary")
    fit(waiting)
    assert not waiting.terms["center_loss"].centers.any()
    waiting.set_stage("binary")
    fit(waiting)
    assert waiting.terms["center_loss"].centers.any()
    from_the_start = tiny_pcnn(center_loss_weight=0.1, stage="ternary")
    fit(from_the_start)
    assert from_the_start.terms["center_loss"].centers.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be an integer of at least 2, but got 1"),
        ({"accumulate": 0}, "accumulate must be an integer of at least 1"),
        ({"gradient_clip": 0.0}, "gradient_clip must be a positive number"),
        ({"optimizer": "lamb"}, "optimizer must be one of sgd, adam, but got 'lamb'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be a number in \[0, 1\)"),
        ({"backbone": "wrn23"}, "backbone must be one of .*wrn22.*, but got 'wrn23'"),
        ({"widths": [4, 4]}, "widths must be 4 positive whole numbers"),
        ({"stage": "quaternary"}, "stage must be one of .*ternary"),
        ({"center_loss_weight": -1.0}, "at least 0, but got -1"),
        ({"sigma": 0.0}, "sigma must be a positive number"),
        ({"projections": 0}, "at least 1, but got 0"),
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, but got 0"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pcnn(**arguments)
