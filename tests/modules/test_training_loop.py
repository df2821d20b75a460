"""The training loop that PCNN and MCN share."""

import traceback

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny import fit, tiny_digits, tiny_mcn, tiny_pcnn, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from pcnn_lightning.callbacks import Diversity, FilterCurves, FlipRatio, GradientNorms, KernelHistograms, LossCurves
from pcnn_lightning.errors import InputError

# --- steps and metrics ----------------------------------------------------------------------------------------------


def test_max_steps_counts_batches():
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch_idx)

    assert fit(tiny_pcnn(), max_epochs=-1, max_steps=7, callbacks=[Count()]).global_step == 7
    assert len(seen) == 7


def test_clipping_bounds_the_norm_of_an_update():
    plain = {"eta1": 0.5, "eta2": 0.5, "momentum": 0.0, "weight_decay": 0.0}
    model = tiny_pcnn(gradient_clip=0.05, **plain)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    fit(model, limit_train_batches=1)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.5 * 0.05, rel=1e-4)


def test_validation_accuracy_is_the_share_of_right_labels():
    model, data = tiny_pcnn(), tiny_digits()
    trainer = fit(model, data)
    model.eval()
    right = total = 0
    for raw in data.val_dataloader():
        images, labels = data.on_after_batch_transfer(raw, 0)
        right += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(right / total)


def test_training_outputs_hold_no_graph():
    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert not any(value.requires_grad for value in outputs.values())

    fit(tiny_pcnn(), callbacks=[Watch()])


def test_prediction_needs_no_loss():
    model, data = tiny_pcnn(), tiny_digits()
    predictions = tiny_trainer().predict(model, datamodule=data)
    assert sum(len(batch["label"]) for batch in predictions) == len(data.predict_set)
    assert all((batch["probability"] > 0).all() for batch in predictions)


@pytest.mark.parametrize("tiny", [tiny_pcnn, tiny_mcn])
def test_channels_last_does_not_change_results(tiny):
    def run(channels_last):
        torch.manual_seed(0)
        model = tiny(channels_last=channels_last).double()
        fit(model, precision="64-true", max_epochs=2)
        return model

    rows, pixels = run(False), run(True)
    kernels = [value for value in pixels.parameters() if value.dim() == 4 and min(value.shape[1:]) > 1]
    assert kernels
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in kernels)
    for name, value in rows.state_dict().items():
        torch.testing.assert_close(pixels.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 10])
def test_labels_outside_the_range_are_refused(bad):
    class Wrong(type(tiny_digits())):
        def on_after_batch_transfer(self, batch, index):
            images, labels = super().on_after_batch_transfer(batch, index)
            labels[0] = bad
            return images, labels

    with pytest.raises(InputError, match=rf"\[0, 9\], but the batch has .*{bad}"):
        fit(tiny_pcnn(), Wrong(image_size=8, train_size=64))


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharding_strategies_are_refused(monkeypatch, strategy):
    kind = type(strategy, (SingleDeviceStrategy,), {})  # the real ones need GPUs to be built
    monkeypatch.setattr(f"pcnn_lightning.modules.refusals.{strategy}", kind)
    with pytest.raises(InputError, match=f"{strategy} shards the kernels.*use ddp"):
        fit(tiny_pcnn(), strategy=kind("cpu"))


class LateAverage(WeightAveraging):
    """Average at the ends of epochs."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (StochasticWeightAveraging(0.01), "StochasticWeightAveraging does not work under manual optimization: use EMA"),
        (EMAWeightAveraging(update_starting_at_step=1), "EMAWeightAveraging would validate and save the untrained"),
        (EMAWeightAveraging(update_starting_at_step=1000), "EMAWeightAveraging .*leave out update_starting_at_step"),
        (LateAverage(), "LateAverage would validate and save the untrained network until its first update"),
    ],
    ids=["SWA", "from the second step on", "from step 1000 on", "at the ends of epochs"],
)
def test_averages_that_are_not_those_of_the_trained_network_are_refused(callback, message):
    with pytest.raises(InputError, match=message):
        fit(tiny_pcnn(), callbacks=[callback])


# --- synchronization ------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Record operations that read a tensor's values, which makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.seen.append("".join(traceback.format_stack(limit=12)))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "model",
    [
        tiny_pcnn(gradient_clip=1.0, center_loss_weight=0.1, label_smoothing=0.1),
        tiny_pcnn(stage="ternary", eta=0.1, accumulate=2),
        tiny_mcn(levels=3, center_loss_weight=0.1),
    ],
    ids=["PCNN", "PCNN, accumulated", "MCN"],
)
def test_no_batch_waits_for_the_device(model):
    """Except for the first batch of an epoch and those at which Lightning logs."""
    waits = Waits()

    class Begin(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx > 0:
                waits.__enter__()

    class End(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx > 0:
                waits.__exit__(None, None, None)

    callbacks = [LossCurves(), KernelHistograms(), FlipRatio(), FilterCurves(), GradientNorms(), Diversity()]
    fit(model, tiny_digits(train_size=96), max_epochs=2, callbacks=[Begin(), *callbacks, End()], log_every_n_steps=50)
    assert not waits.seen, waits.seen[0]
    with waits:  # check that synchronization is noticed at all
        float(torch.ones(()))
    assert len(waits.seen) == 1
