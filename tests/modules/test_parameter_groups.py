"""The parameter groups of the optimizer."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from tiny import fit, tiny_mcn, tiny_pcnn

from pcnn_lightning import OneBitClassifier, ProjectionConv2d
from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.modules.second_rate import TwoRateClassifier


def groups(model):
    return {group["name"]: group for group in model.configure_optimizers().param_groups}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    ("family", "arguments"),
    [("projection", {}), ("projection", {"full_precision": True}), ("modulation", {}), ("modulation", {"levels": 3})],
)
def test_groups_are_disjoint_and_complete(backbone, family, arguments):
    maps = 3 if backbone == "vgg_small" else 5 if backbone.startswith("resnet") else 4
    tiny = tiny_pcnn if family == "projection" else tiny_mcn
    model = tiny(backbone=backbone, widths=[2] * maps, eta1=0.3, eta2=0.02, **arguments)
    found = groups(model)
    second = f"{family}s"
    assert list(found) == (["kernels"] if "full_precision" in arguments else ["kernels", second, "others"])
    members = [id(parameter) for group in found.values() for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    by_name = {id(p) for name, p in model.named_parameters() if name.endswith(f".{family}")}
    assert {id(p) for p in found.get(second, {"params": []})["params"]} == by_name
    assert [group["lr"] for group in found.values()] == [0.3, 0.02, 0.3][: len(found)]
    layers = model.one_bit_layers.values()
    assert not layers or {id(layer.weight) for layer in layers} == {id(one) for one in found["kernels"]["params"]}


class Grouped(TwoRateClassifier):
    family = "PCNN"

    def __init__(self, **others):
        super().__init__(**others)
        self.build_network(partial(ProjectionConv2d, groups=2, bias=True))


def test_biases_are_learned_at_the_rate_of_the_kernels():
    model = Grouped(in_channels=1, backbone="wrn7", widths=[2, 2, 4, 4], schedule="constant", eta1=0.05)
    found, layers = groups(model), list(model.one_bit_layers.values())
    assert len(layers) == 3
    members = {id(parameter): group["name"] for group in found.values() for parameter in group["params"]}
    assert {members[id(layer.bias)] for layer in layers} == {"others"}
    fit(model)
    assert all(layer.bias.any() for layer in layers)


def test_kernels_may_have_a_weight_decay_of_their_own():
    found = groups(tiny_pcnn(kernel_weight_decay=0.0))
    assert [group["weight_decay"] for group in found.values()] == [0, 0, 3e-4]
    twin = groups(tiny_pcnn(kernel_weight_decay=0.0, full_precision=True))
    assert [group["weight_decay"] for group in twin.values()] == [3e-4]
    with pytest.raises(ValueError, match="kernel_weight_decay must be a number of at least 0, but got -1"):
        tiny_pcnn(kernel_weight_decay=-1)


def test_projections_have_no_weight_decay_by_default():
    assert groups(tiny_pcnn())["projections"]["weight_decay"] == 0
    assert groups(tiny_pcnn())["kernels"]["weight_decay"] == 3e-4
    assert groups(tiny_pcnn(projection_weight_decay=0.1))["projections"]["weight_decay"] == 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("still", ["eta1", "eta2"])
def test_a_rate_of_zero_leaves_its_parameters_untouched(still, optimizer):
    model = tiny_pcnn(**{still: 0.0}, optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model)
    for name, parameter in model.named_parameters():
        is_projection = name.endswith(".projection")
        assert torch.equal(before[name], parameter) == (is_projection if still == "eta2" else not is_projection), name


def test_the_learning_rate_monitor_sees_all_groups(tmp_path):
    monitor = LearningRateMonitor("step")
    fit(tiny_pcnn(), callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert {name.rpartition("/")[2]: set(values) for name, values in monitor.lrs.items()} == {
        "kernels": {0.05},
        "projections": {0.01},
        "others": {0.05},
    }


def test_a_second_parameter_without_a_learning_rate_is_refused():
    class OneRate(OneBitClassifier):
        family = "PCNN"

        def __init__(self):
            super().__init__(in_channels=1, backbone="wrn7", widths=[2, 2, 2, 2])
            self.build_network(ProjectionConv2d)

    with pytest.raises(ValueError, match="projections have no learning rate: derive from TwoRateClassifier"):
        OneRate().configure_optimizers()
