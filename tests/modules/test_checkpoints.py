"""Loading checkpoints: stages, averaged weights, ``init_from`` and mismatches."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from tiny import fit, tiny_mcn, tiny_pcnn

from pcnn_lightning import MCN, PCNN, StageSwitch
from pcnn_lightning.errors import InputError


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("stage", ["ternary", "binary"])
def test_a_checkpoint_loads_alone_and_in_the_right_stage(tmp_path, stage):
    model = tiny_pcnn(stage="ternary", center_loss_weight=0.1)
    model.set_stage(stage)
    fit(model).save_checkpoint(tmp_path / "x.ckpt")
    loaded = PCNN.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.stage == stage
    assert {layer.stage for layer in loaded.one_bit_layers.values()} == {stage}
    assert_equal(weights(model), weights(loaded))


@pytest.mark.parametrize(("arguments", "stage"), [({"levels": 4}, "binary"), ({"binarize": False}, "real")])
def test_an_mcn_checkpoint_loads_alone(tmp_path, arguments, stage):
    model = tiny_mcn(**arguments, center_loss_weight=0.1)
    fit(model).save_checkpoint(tmp_path / "x.ckpt")
    loaded = MCN.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.stage == stage
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


# --- averaged weights -----------------------------------------------------------------------------------------------


def test_averaged_weights_are_in_the_right_stage(tmp_path):
    model = tiny_pcnn(stage="ternary")
    model.set_stage("binary")
    callbacks = [EMAWeightAveraging(), ModelCheckpoint(tmp_path, filename="x")]
    fit(model, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    assert PCNN.load_from_checkpoint(tmp_path / "x.ckpt").stage == "binary"


@pytest.mark.parametrize("family", [tiny_pcnn, tiny_mcn])
def test_weights_are_averaged_over_the_stage_switch(tmp_path, family):
    """Against an average computed from the weights after each step."""
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    model = family(**({"stage": "ternary"} if family is tiny_pcnn else {}))
    keep = ModelCheckpoint(tmp_path, filename="x")
    callbacks = [Watch(), EMAWeightAveraging(decay=0.8), StageSwitch(1), keep]
    fit(model, max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    assert model.stage == "binary"
    averages = seen[0]
    for weights_then in seen[1:]:
        averages = {name: 0.8 * value + 0.2 * weights_then[name] for name, value in averages.items()}
    loaded = dict(type(model).load_from_checkpoint(keep.best_model_path).named_parameters())
    for name, value in averages.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-4, atol=1e-5, msg=name)


# --- starting from a checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reinit", [False, True])
def test_a_second_run_starts_from_a_ternary_one(tmp_path, reinit):
    first = tiny_pcnn(stage="ternary")
    fit(first).save_checkpoint(tmp_path / "ternary.ckpt")
    second = tiny_pcnn(init_from=str(tmp_path / "ternary.ckpt"), reinit_projection=reinit, eta1=0.0, eta2=0.0)
    fit(second, limit_train_batches=1)
    assert second.stage == "binary"
    for name, parameter in second.named_parameters():
        redrawn = reinit and name.endswith(".projection")
        assert torch.equal(parameter, first.get_parameter(name)) != redrawn, name


def test_new_hyperparameters_override_the_checkpoint(tmp_path):
    fit(tiny_pcnn(momentum=0.9, weight_decay=3e-4)).save_checkpoint(tmp_path / "x.ckpt")
    model = tiny_pcnn(momentum=0.5, weight_decay=0.1, eta1=0.02)
    trainer = fit(model, ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)
    kernels = trainer.optimizers[0].param_groups[0]
    assert (kernels["momentum"], kernels["weight_decay"], kernels["lr"]) == (0.5, 0.1, 0.02)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    fit(tiny_pcnn()).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(
        InputError, match=r"classifier\.weight is \(10, 4\) in the checkpoint and \(10, 8\) in the model"
    ):
        fit(tiny_pcnn(widths=[2, 2, 2, 4]), ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)


def test_a_ternary_checkpoint_is_not_resumed_as_binary(tmp_path):
    fit(tiny_pcnn(stage="ternary")).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"model\.init_from instead of --ckpt_path"):
        fit(tiny_pcnn(stage="binary"), ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)


def test_resuming_with_another_optimizer_is_refused(tmp_path):
    fit(tiny_pcnn()).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="state of optimizer sgd, which adam cannot go on from"):
        fit(tiny_pcnn(optimizer="adam"), ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)
    assert PCNN.load_from_checkpoint(tmp_path / "x.ckpt", optimizer="adam").hparams["optimizer"] == "adam"


def test_checkpoints_by_time_are_refused(tmp_path):
    callback = ModelCheckpoint(tmp_path, train_time_interval=timedelta(seconds=1))
    with pytest.raises(InputError, match=r"train_time_interval.*set every_n_train_steps or every_n_epochs"):
        fit(tiny_pcnn(), callbacks=[callback], enable_checkpointing=True)
