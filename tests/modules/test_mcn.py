"""The MCN module, where it differs from PCNN."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tiny import fit, tiny_digits, tiny_mcn
from torch.nn import functional as F

from pcnn_lightning import MCN, PCNN, ModulatedConv2d, StageSwitch
from pcnn_lightning.cli import main
from pcnn_lightning.stages import STAGES

CONFIGS = Path(__file__).parents[2] / "configs"


class Record(Callback):
    """Record the metrics of each epoch and the k-means centers of each batch."""

    def __init__(self):
        self.metrics, self.centers = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.centers.append([layer.centers.tolist() for layer in pl_module.one_bit_layers.values() if layer.levels > 2])

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append(dict(trainer.callback_metrics))


def test_logged_metrics():
    trainer = fit(tiny_mcn(center_loss_weight=1e-3))
    assert set(trainer.callback_metrics) == {
        *(f"train/{name}" for name in ("loss", "cross_entropy", "filter_loss", "center_loss", "accuracy")),
        *(f"val/{name}" for name in ("loss", "cross_entropy", "filter_loss", "center_loss", "accuracy")),
        "lr/kernels",
        "lr/modulations",
        "stage",
    }


@pytest.mark.parametrize("average", [False, True])
def test_training_equals_a_manual_loop(average):
    """A manual loop with two SGD optimizers that decay exponentially, autograd for 3.18 and the same batches."""
    arguments = {"average": average, "filter_loss_weight": 0.01, "weight_decay": 1e-3}
    rates = {"schedule": "exponential", "decay": 0.5, "projection_decay": 0.25}
    model = tiny_mcn(**arguments, **rates)
    twin = tiny_mcn(**arguments)
    twin.load_state_dict(model.state_dict())
    fit(model, tiny_digits(), max_epochs=2)

    data = tiny_digits()
    data.setup("fit")
    layers = [layer for layer in twin.modules() if isinstance(layer, ModulatedConv2d)]
    filters = {id(layer.modulation) for layer in layers}
    others = [p for p in twin.parameters() if id(p) not in filters]
    kernels = torch.optim.SGD(others, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    modulations = torch.optim.SGD([layer.modulation for layer in layers], 0.01, momentum=0.9, nesterov=True)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        kernels.param_groups[0]["lr"], modulations.param_groups[0]["lr"] = 0.05 * 0.5**epoch, 0.01 * 0.25**epoch
        for raw in loader:
            images, labels = data.on_after_batch_transfer(raw, 0)
            loss = F.cross_entropy(twin(images), labels)
            for layer in layers:
                planes = layer.modulation.abs()
                if average:
                    planes = planes.mean(dim=(1, 2), keepdim=True)
                signs = torch.where(layer.weight.detach() < 0, -1.0, 1.0)
                quantized = layer.weight.detach().abs().mean() * signs
                for plane in planes:
                    loss = loss + 0.005 * (layer.weight - quantized * plane).square().sum()
            kernels.zero_grad()
            modulations.zero_grad()
            loss.backward()
            kernels.step()
            modulations.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_centers_are_refreshed_once_an_epoch():
    record = Record()
    fit(tiny_mcn(levels=3, eta1=0.1), max_epochs=3, callbacks=[record])  # 4 batches an epoch
    epochs = [record.centers[4 * epoch : 4 * epoch + 4] for epoch in range(3)]
    assert all(batch == epoch[0] for epoch in epochs for batch in epoch)
    assert epochs[0][0] != epochs[1][0] != epochs[2][0]


def test_center_loss_can_start_at_an_epoch():
    record, model = Record(), tiny_mcn(center_loss_weight=0.1, center_loss_start=1)
    fit(model, max_epochs=1)
    assert not model.terms["center_loss"].centers.any()
    fit(model, max_epochs=2, callbacks=[record])
    assert model.terms["center_loss"].centers.any()
    assert ["train/center_loss" in metrics for metrics in record.metrics] == [False, True]


def test_dropout_reaches_the_backbone():
    rates = {module.p for module in tiny_mcn(dropout=0.3).modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.3}


def test_stage_switch_does_not_affect_mcn():
    model = tiny_mcn()
    trainer = fit(model, max_epochs=3, callbacks=[StageSwitch(epoch=1)])
    assert float(trainer.callback_metrics["stage"]) == STAGES["binary"]
    assert model.stage_start == 0  # the schedule spans the whole run


@pytest.mark.parametrize(("config", "family"), [("digits", MCN), ("mcn_digits", PCNN)])
def test_configs_work_with_the_other_family(tmp_path, monkeypatch, config, family):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pcnn_lightning"])
    files = [f"--config={CONFIGS / config}.yaml", f"--model={family.__name__}", "--model.widths=[2,2,2,2]"]
    cli = main(["fit", *files, "--trainer.max_epochs=2", "--trainer.limit_train_batches=2"])
    assert type(cli.model) is family
    assert cli.trainer.global_step == 4
    folder = tmp_path / "runs" / config / "version_0"
    assert {file.name for file in folder.glob("losses.*")} == {"losses.csv", "losses.png"}
    assert (folder / "checkpoints" / "binary.ckpt").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"planes": 0}, "planes must be an integer of at least 1, but got 0"),
        ({"levels": 5}, "levels must be 2, 3 or 4, but got 5"),
        ({"levels": 3, "scale": 0.1}, "scale is for two levels, but levels is 3"),
        ({"scale": 0.0}, "scale must be a positive number, but got 0.0"),
        ({"filter_loss_weight": -1.0}, "filter_loss_weight must be a number of at least 0, but got -1.0"),
        ({"modulation_init": "zeros"}, "modulation_init must be one of .*, but got 'zeros'"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), but got 1.0"),
        ({"backbone": "wrn7", "dropout": 0.1}, "dropout must be 0 for backbone wrn7"),
        ({"center_loss_start": -1}, "center_loss_start must be an epoch or a stage, such as .*, but got -1"),
        ({"center_loss_start": "soon"}, "center_loss_start must be an epoch or a stage, such as .*, but got 'soon'"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_mcn(**arguments)
