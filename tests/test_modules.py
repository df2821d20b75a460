import math
import traceback
from datetime import timedelta
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny import fit, tiny_digits, tiny_mcn, tiny_pcnn, tiny_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pcnn_lightning import PCNN, ProjectionConv2d, StageSwitch
from pcnn_lightning.backbones import BACKBONES
from pcnn_lightning.callbacks import (
    Diversity,
    FilterCurves,
    FlipRatio,
    GradientNorms,
    KernelHistograms,
    LossCurves,
)
from pcnn_lightning.errors import DivergedError, InputError


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def groups(model):
    return {group["name"]: group for group in model.configure_optimizers().param_groups}


# Parameter groups.


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    ("family", "arguments"),
    [("projection", {}), ("projection", {"full_precision": True}), ("modulation", {}), ("modulation", {"levels": 3})],
)
def test_groups_are_disjoint_and_complete(backbone, family, arguments):
    maps = 3 if backbone == "vgg_small" else 5 if backbone.startswith("resnet") else 4
    tiny = tiny_pcnn if family == "projection" else tiny_mcn
    model = tiny(backbone=backbone, stages=[2] * maps, eta1=0.3, eta2=0.02, **arguments)
    found = groups(model)
    kernels, projections = ({id(p) for p in found[name]["params"]} for name in ("kernels", "projections"))
    assert not kernels & projections
    assert kernels | projections == {id(p) for p in model.parameters()}
    by_name = {id(p) for name, p in model.named_parameters() if name.endswith(f".{family}")}
    assert projections == by_name
    assert bool(projections) == ("full_precision" not in arguments)
    assert (found["kernels"]["lr"], found["projections"]["lr"]) == (0.3, 0.02)


def test_projections_have_no_weight_decay_unless_asked():
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


# The loop.


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 8), (2, 4), (3, 4), (4, 2), (9, 2)])
def test_global_step_counts_updates(accumulate, updates):
    trainer = fit(tiny_pcnn(accumulate=accumulate), max_epochs=2)  # 4 batches an epoch
    assert trainer.global_step == updates


def test_max_steps_counts_batches():
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch_idx)

    assert fit(tiny_pcnn(), max_epochs=-1, max_steps=7, callbacks=[Count()]).global_step == 7
    assert len(seen) == 7


def test_a_run_equals_one_written_by_hand():
    """Two plain SGDs, autograd for 3.61, and the same batches."""
    model = tiny_pcnn(stage="ternary", projection_loss_weight=0.01, center_loss_weight=0.01, label_smoothing=0.1)
    twin = tiny_pcnn(stage="ternary", projection_loss_weight=0.01)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("center_loss")})
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
            loss = loss + sum(layer.projection_loss() for layer in layers)
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
    torch.testing.assert_close(model.center_loss.centers, centers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_accumulation_equals_one_batch_of_the_whole_size(eta):
    """Without batch statistics; 56 images make two updates of 24 and one of 8."""

    def run(batch_size, accumulate):
        torch.manual_seed(0)
        model = tiny_pcnn(accumulate=accumulate, eta=eta, center_loss_weight=0.01, projection_loss_weight=0.1).double()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.0
                layer.forward = partial(frozen_norm, layer)
        data = tiny_digits(batch_size=batch_size, train_size=56)
        data.on_after_batch_transfer = lambda batch, index, of=data.on_after_batch_transfer: [
            part.double() if part.is_floating_point() else part for part in of(batch, index)
        ]
        loader = data.train_dataloader
        data.train_dataloader = lambda: with_the_last_batch(loader())
        trainer = fit(model, data)
        assert trainer.global_step == 3
        return model

    whole, parts = run(24, 1), run(8, 3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-7, atol=1e-9, msg=name)


def frozen_norm(layer, x):
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=False)


def with_the_last_batch(loader):
    return type(loader)(
        loader.dataset, loader.batch_size, sampler=loader.sampler, collate_fn=loader.collate_fn, drop_last=False
    )


def test_rates_follow_their_schedules_in_each_stage():
    rates = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append([group["lr"] for group in optimizer.param_groups])

    model = tiny_pcnn(
        eta1=1e-3, eta2=1e-4, schedule="cosine", projection_schedule="multistep", projection_milestones=[0.5]
    )
    fit(model, max_epochs=3, callbacks=[Watch()])
    expected = [
        [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 12)), 1e-4 * (0.2 if step >= 6 else 1)] for step in range(12)
    ]
    assert rates == [pytest.approx(pair) for pair in expected]


def test_a_schedule_without_an_end_is_refused():
    with pytest.raises(InputError, match=r"max_epochs or trainer\.max_steps"):
        fit(tiny_pcnn(schedule="cosine"), max_epochs=-1)


def test_clipping_bounds_the_norm_of_an_update():
    plain = {"eta1": 0.5, "eta2": 0.5, "momentum": 0.0, "weight_decay": 0.0}
    model = tiny_pcnn(gradient_clip=0.05, **plain)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    fit(model, limit_train_batches=1)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.5 * 0.05, rel=1e-4)


def test_a_scaled_loss_changes_nothing_but_an_overflow_skips_the_update():
    """16-mixed needs a GPU for its halves, but its scaler works anywhere."""

    def run(scale, **trainer):
        torch.manual_seed(0)
        model = tiny_pcnn(eta=0.1, projection_loss_weight=0.1, gradient_clip=0.5)
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        precision.forward_context = precision.autocast_context_manager = partial(torch.autocast, "cpu", enabled=False)
        fit(model, plugins=[precision], **trainer)
        return model

    torch.manual_seed(0)
    plain = tiny_pcnn(eta=0.1, projection_loss_weight=0.1, gradient_clip=0.5)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    fit(plain)
    for name, value in run(2.0**10).state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)
    for name, parameter in run(math.inf, limit_train_batches=1).named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_bf16_trains_and_keeps_the_projection_loss_in_float32():
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs)

    fit(tiny_pcnn(), precision="bf16-mixed", callbacks=[Watch()])
    assert {value.dtype for outputs in seen for value in outputs.values()} == {torch.float32}
    assert all(outputs["loss"].isfinite() for outputs in seen)


def test_the_logged_names():
    trainer = fit(tiny_pcnn(center_loss_weight=1e-3))
    assert set(trainer.callback_metrics) == {
        *(f"train/{name}" for name in ("loss", "cross_entropy", "projection_loss", "center_loss", "accuracy")),
        *(f"val/{name}" for name in ("loss", "cross_entropy", "projection_loss", "center_loss", "accuracy")),
        "lr/kernels",
        "lr/projections",
        "stage",
    }


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


# Full precision, stages, center loss.


def test_the_full_precision_twin_has_the_same_widths_and_no_projection():
    ours, twin = tiny_pcnn(projections=4), tiny_pcnn(projections=4, full_precision=True)
    shapes = [layer.quantized_weight().shape for layer in ours.projection_layers]
    assert [m.weight.shape for m in twin.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)][
        1:
    ] == shapes
    assert not twin.projection_layers
    trainer = fit(twin)
    assert twin.stage == "full_precision"
    assert float(trainer.callback_metrics["train/projection_loss"]) == 0


def test_center_loss_may_wait_for_the_binary_stage():
    waiting = tiny_pcnn(center_loss_weight=0.1, center_loss_start="binary", stage="ternary")
    fit(waiting)
    assert not waiting.center_loss.centers.any()
    waiting.set_stage("binary")
    fit(waiting)
    assert waiting.center_loss.centers.any()
    from_the_start = tiny_pcnn(center_loss_weight=0.1, stage="ternary")
    fit(from_the_start)
    assert from_the_start.center_loss.centers.any()


# Checkpoints.


@pytest.mark.parametrize("stage", ["ternary", "binary"])
def test_a_checkpoint_loads_alone_and_in_the_right_stage(tmp_path, stage):
    model = tiny_pcnn(stage="ternary", center_loss_weight=0.1)
    model.set_stage(stage)
    fit(model).save_checkpoint(tmp_path / "x.ckpt")
    loaded = PCNN.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.stage == stage
    assert {layer.levels for layer in loaded.projection_layers} == {stage}
    assert_equal(weights(model), weights(loaded))


def test_averaged_weights_are_in_the_right_stage(tmp_path):
    model = tiny_pcnn(stage="ternary")
    model.set_stage("binary")
    callbacks = [EMAWeightAveraging(), ModelCheckpoint(tmp_path, filename="x")]
    fit(model, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    assert PCNN.load_from_checkpoint(tmp_path / "x.ckpt").stage == "binary"


def test_every_layer_of_a_trained_binary_network_holds_two_values():
    model = tiny_pcnn()
    fit(model)
    for layer in model.projection_layers:
        scale = layer.weight.abs().mean()
        assert torch.equal(layer.quantized_weight().unique(), torch.stack([-scale, scale]).detach())


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


def test_what_a_resumed_run_is_told_holds(tmp_path):
    fit(tiny_pcnn(momentum=0.9, weight_decay=3e-4)).save_checkpoint(tmp_path / "x.ckpt")
    model = tiny_pcnn(momentum=0.5, weight_decay=0.1, eta1=0.02)
    trainer = fit(model, ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)
    kernels = trainer.optimizers[0].param_groups[0]
    assert (kernels["momentum"], kernels["weight_decay"], kernels["lr"]) == (0.5, 0.1, 0.02)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path):
    fit(tiny_pcnn()).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(
        InputError, match=r"classifier\.weight is \(10, 4\) in the checkpoint and \(10, 8\) in the model"
    ):
        fit(tiny_pcnn(stages=[2, 2, 2, 4]), ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)


def test_a_ternary_checkpoint_is_not_resumed_as_binary(tmp_path):
    fit(tiny_pcnn(stage="ternary")).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"model\.init_from instead of --ckpt_path"):
        fit(tiny_pcnn(stage="binary"), ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)


def test_another_optimizer_cannot_go_on(tmp_path):
    fit(tiny_pcnn()).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="state of optimizer sgd, which adam cannot go on from"):
        fit(tiny_pcnn(optimizer="adam"), ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)
    assert PCNN.load_from_checkpoint(tmp_path / "x.ckpt", optimizer="adam").hparams["optimizer"] == "adam"


# Guards.


class Poison(Callback):
    """Make the weights of a network infinite after so many batches."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.batches:
            with torch.no_grad():
                pl_module.net.classifier.weight.fill_(math.nan)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    with pytest.raises(DivergedError, match=r"step 6 .*eta1 \(now 0.05\).*last\.ckpt"):
        fit(tiny_pcnn(), max_epochs=3, callbacks=[Poison(6), checkpoint], enable_checkpointing=True)
    loaded = PCNN.load_from_checkpoint(tmp_path / "last.ckpt")
    assert all(value.isfinite().all() for value in loaded.state_dict().values())


def test_weights_that_are_no_numbers_are_not_saved_even_before_a_loss_shows_it(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    with pytest.raises(DivergedError, match=r"classifier\.weight holds NaN"):
        fit(tiny_pcnn(), max_epochs=3, callbacks=[Poison(8), checkpoint], enable_checkpointing=True)
    for file in tmp_path.glob("*.ckpt"):
        loaded = PCNN.load_from_checkpoint(file)
        assert all(value.isfinite().all() for value in loaded.state_dict().values())


@pytest.mark.parametrize("bad", [-1, 10])
def test_labels_outside_the_range_are_refused(bad):
    class Wrong(type(tiny_digits())):
        def on_after_batch_transfer(self, batch, index):
            images, labels = super().on_after_batch_transfer(batch, index)
            labels[0] = bad
            return images, labels

    with pytest.raises(InputError, match=rf"\[0, 9\], but the batch has .*{bad}"):
        fit(tiny_pcnn(), Wrong(image_size=8, train_size=64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, but got 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"gradient_clip": 0.0}, "gradient_clip must be positive"),
        ({"optimizer": "lamb"}, "optimizer must be one of sgd, adam, but got 'lamb'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"backbone": "wrn23"}, "backbone must be one of .*wrn22.*, but got 'wrn23'"),
        ({"stages": [4, 4]}, "stages must be 4 positive numbers"),
        ({"stage": "quaternary"}, "stage must be one of .*ternary"),
        ({"center_loss_weight": -1.0}, "at least 0, but got -1"),
        ({"sigma": 0.0}, "sigma must be a positive number"),
        ({"projections": 0}, "at least 1, but got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, but got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pcnn(**arguments)


def test_compiled_training_equals_eager_training():
    def run(compile):
        torch.manual_seed(0)
        model = tiny_pcnn(compile=compile, stage="ternary")
        fit(model, limit_train_batches=2)
        return model

    torch._dynamo.config.suppress_errors = False
    eager, compiled = run(False), run(True)
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_prediction_needs_no_loss():
    model, data = tiny_pcnn(), tiny_digits()
    predictions = tiny_trainer().predict(model, datamodule=data)
    assert sum(len(batch["label"]) for batch in predictions) == len(data.predict_set)
    assert all((batch["probability"] > 0).all() for batch in predictions)


def test_validation_within_an_update_loses_no_gradient():
    def run(**trainer):
        torch.manual_seed(0)
        model = tiny_pcnn(accumulate=4)
        fit(model, **trainer)
        return model.state_dict()

    between, after = run(val_check_interval=1), run(limit_val_batches=0)
    for name, value in after.items():
        assert torch.equal(between[name], value), name


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_that_shard_kernels_are_refused_by_name(monkeypatch, strategy):
    kind = type(strategy, (SingleDeviceStrategy,), {})  # the real ones need GPUs to be built
    monkeypatch.setattr(f"pcnn_lightning.modules.two_rates.{strategy}", kind)
    with pytest.raises(InputError, match=f"{strategy} shards the kernels.*use ddp"):
        fit(tiny_pcnn(), strategy=kind("cpu"))


def test_checkpoints_by_time_are_refused(tmp_path):
    callback = ModelCheckpoint(tmp_path, train_time_interval=timedelta(seconds=1))
    with pytest.raises(InputError, match=r"train_time_interval.*set every_n_train_steps or every_n_epochs"):
        fit(tiny_pcnn(), callbacks=[callback], enable_checkpointing=True)


def test_the_learning_rate_monitor_sees_both_groups(tmp_path):
    monitor = LearningRateMonitor("step")
    fit(tiny_pcnn(), callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert {name.rpartition("/")[2]: set(values) for name, values in monitor.lrs.items()} == {
        "kernels": {0.05},
        "projections": {0.01},
    }


@pytest.mark.parametrize("family", [tiny_pcnn, tiny_mcn])
def test_averaged_weights_over_the_switch_are_the_averages_of_the_run(tmp_path, family):
    """EMA by hand from the weights after each step."""
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


def test_early_stopping_begins_anew_with_the_binary_stage():
    stopping = EarlyStopping("val/accuracy", mode="max", patience=2, min_delta=1.0)  # nothing is ever better
    trainer = fit(tiny_pcnn(stage="ternary"), max_epochs=8, callbacks=[StageSwitch(2), stopping])
    assert trainer.current_epoch == 5  # 2 ternary epochs, then a best one and 2 that are not better


def test_a_run_compiles_once_a_stage(monkeypatch):
    """Neither evaluation, nor its smaller last batch, nor the step behind a validation compiles anew."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    data = tiny_digits(batch_size=24, train_size=72)  # 3 batches; 144 images to validate on do not fill the last
    model = tiny_pcnn(compile=True, stage="ternary")
    fit(model, data, max_epochs=4, callbacks=[StageSwitch(2)], num_sanity_val_steps=1)
    assert model.stage == "binary"
    assert len(graphs) == 2


def test_what_cannot_be_compiled_is_said_in_one_line(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with pytest.raises(InputError, match=r"compile: .*no compiler here.* Without it: compile false") as caught:
        fit(tiny_pcnn(compile=True))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tiny", [tiny_pcnn, tiny_mcn])
def test_channels_last_changes_the_layout_alone(tiny):
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


class Waits(TorchDispatchMode):
    """Counts operations that look at a tensor's values, for which the host has to wait for the device."""

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
    """But for the first of an epoch, and those at which Lightning logs."""
    waits = Waits()

    class Begin(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx > 0:
                waits.__enter__()

    class End(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx > 0:
                waits.__exit__(None, None, None)

    look = [LossCurves(), KernelHistograms(), FlipRatio(), FilterCurves(), GradientNorms(), Diversity()]
    fit(model, tiny_digits(train_size=96), max_epochs=2, callbacks=[Begin(), *look, End()], log_every_n_steps=50)
    assert not waits.seen, waits.seen[0]
    with waits:  # it does see one
        float(torch.ones(()))
    assert len(waits.seen) == 1
