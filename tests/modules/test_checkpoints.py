"""Loading checkpoints: stages, averaged weights, ``init_from`` and mismatches."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from tiny import fit, tiny_digits, tiny_mcn, tiny_pcnn, tiny_trainer

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


@pytest.fixture
def started(tmp_path):
    """A run that starts from the network of another, and the file of the other, whose weights are far away."""
    first = tiny_pcnn()
    with torch.no_grad():
        first.net.classifier.bias += 100
    fit(first, limit_train_batches=1).save_checkpoint(tmp_path / "first.ckpt")
    model = tiny_pcnn(init_from=str(tmp_path / "first.ckpt"))
    trainer = fit(model)
    (tmp_path / "first.ckpt").unlink()
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    return model


class Begin(Callback):
    """Keep the weights that training begins with."""

    def on_train_start(self, trainer, pl_module):
        self.weights = weights(pl_module.net)


def test_a_second_fit_does_not_start_from_init_from_again(started):
    assert started.net.classifier.bias.min() > 50
    learned, begin = weights(started.net), Begin()
    fit(started, callbacks=[begin])
    assert_equal(begin.weights, learned)


@pytest.mark.parametrize("load", ["load_from_checkpoint", "load_state_dict"])
def test_what_was_loaded_is_not_replaced_by_init_from(tmp_path, started, load):
    if load == "load_from_checkpoint":
        model = PCNN.load_from_checkpoint(tmp_path / "second.ckpt")
    else:
        model = tiny_pcnn(init_from=started.hparams["init_from"])
        model.load_state_dict(started.state_dict())
    begin = Begin()
    fit(model, callbacks=[begin])
    assert_equal(begin.weights, weights(started.net))


# --- checkpoints that hold less or more -----------------------------------------------------------------------------


def test_a_checkpoint_of_weights_only_can_be_tested_but_not_gone_on_from(tmp_path):
    model, file = tiny_pcnn(), str(tmp_path / "x.ckpt")
    fit(model).save_checkpoint(file, weights_only=True)
    (expected,) = tiny_trainer().test(model, tiny_digits(), verbose=False)
    assert tiny_trainer().test(tiny_pcnn(), tiny_digits(), ckpt_path=file, verbose=False) == [expected]
    with pytest.raises(InputError, match=r"has weights only.*start a new run with init_from") as caught:
        fit(tiny_pcnn(), ckpt_path=file, max_epochs=2)
    assert "\n" not in str(caught.value)


def test_accumulate_cannot_change_within_an_update(tmp_path):
    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    fit(tiny_pcnn(accumulate=2), callbacks=[Keep()])
    with pytest.raises(InputError, match="within an epoch: accumulate must be 2, but got 3"):
        fit(tiny_pcnn(accumulate=3), ckpt_path=str(tmp_path / "0.ckpt"))
    assert fit(tiny_pcnn(accumulate=3), ckpt_path=str(tmp_path / "3.ckpt"), max_epochs=2).global_step == 2 + 2


@pytest.mark.parametrize(("trained", "tested"), [(0.1, 0.0), (0.0, 0.1)])
def test_only_the_network_of_a_checkpoint_is_needed_to_test_and_predict(tmp_path, trained, tested):
    """Center loss keeps its centers, which only training needs."""
    model, file = tiny_pcnn(center_loss_weight=trained), str(tmp_path / "x.ckpt")
    fit(model).save_checkpoint(file)
    data, other = tiny_digits(), tiny_pcnn(center_loss_weight=tested)
    (expected,) = tiny_trainer().test(model, data, verbose=False)
    (result,) = tiny_trainer().test(other, data, ckpt_path=file, verbose=False)
    assert result["test/accuracy"] == expected["test/accuracy"]
    assert_equal(weights(other.net), weights(model.net))
    assert tiny_trainer().predict(tiny_pcnn(center_loss_weight=tested), data, ckpt_path=file)
    with pytest.raises(InputError, match=r"center_loss\.centers is "):
        fit(tiny_pcnn(center_loss_weight=tested), ckpt_path=file, max_epochs=2)
