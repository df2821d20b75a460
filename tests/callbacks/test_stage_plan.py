"""Runs that go through a plan of stages."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tiny import Decline, Stop, fit, tiny_digits, tiny_mcn, tiny_pcnn

from pcnn_lightning import BNN, LossCurves, SignActivation, StageCheckpoint, StagePlan, StageSwitch
from pcnn_lightning.errors import InputError
from pcnn_lightning.stages import Stage

ADAM: dict[str, Any] = {"optimizer": "adam", "eta1": 0.002, "schedule": "constant"}
LAMB: dict[str, Any] = {"optimizer": "lamb"}


def tiny_bnn(**arguments):
    defaults = {"backbone": "wrn7", "widths": [2, 2, 4, 4], "schedule": "cosine", "eta1": 0.05}
    return BNN(in_channels=1, **{**defaults, **arguments})


class Record(Callback):
    """Record how each epoch begins."""

    def __init__(self):
        self.epochs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            optimizer = trainer.optimizers[0]
            group = optimizer.param_groups[0]
            steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
            self.epochs.append(
                {
                    "stage": pl_module.stage_name,
                    "layers": [layer.stage for layer in pl_module.one_bit_layers.values()],
                    "signs": [activation.enabled for activation in pl_module.sign_activations],
                    "optimizer": type(optimizer).__name__,
                    "rate": group["lr"],
                    "decay": group["weight_decay"],
                    "steps": max(steps, default=0),
                }
            )

    def column(self, name):
        return [epoch[name] for epoch in self.epochs]


def run(model, stages, **arguments):
    record = Record()
    patience = arguments.pop("patience", None)
    more = arguments.pop("callbacks", [])
    fit(model, callbacks=[StagePlan(stages, patience), record, *more], **{"max_epochs": 6, **arguments})
    return record


def test_each_stage_has_its_length_and_its_settings():
    stages = [
        Stage("real", epochs=2, activations="real", **ADAM),
        Stage("ternary", epochs=0.5, weight_decay=0.01, kernel_weight_decay=0.0),
        Stage("binary", eta1=0.01, schedule="constant"),
    ]
    model = tiny_pcnn(schedule="cosine")
    record = run(model, stages)
    assert record.column("stage") == ["real", "real", "ternary", "ternary", "ternary", "binary"]
    assert record.column("optimizer") == ["Adam"] * 2 + ["SGD"] * 4
    assert record.column("steps") == [1, 5, 0, 0, 0, 0]  # four batches an epoch; SGD counts none
    cosine = [0.05 * 0.5 * (1 + math.cos(math.pi * third / 3)) for third in range(3)]
    assert record.column("rate") == pytest.approx([0.002, 0.002, *cosine, 0.01])
    assert record.column("decay") == [3e-4, 3e-4, 0, 0, 0, 3e-4]
    assert record.column("layers") == [[name] * 3 for name in record.column("stage")]
    assert record.column("signs") == [[False] * 3] * 2 + [[True] * 3] * 4
    assert (model.stage, model.hparams["eta1"]) == ("binary", 0.05)


def test_a_stage_may_come_again_as_a_warm_restart():
    ends = []

    class Weights(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                ends.append(([one.clone() for one in pl_module.parameters()], len(trainer.optimizers[0].state)))

        def on_train_epoch_end(self, trainer, pl_module):
            ends.append([one.clone() for one in pl_module.parameters()])

    model = tiny_bnn()
    record = run(model, [Stage("binary", epochs=1), Stage("binary", epochs=1)], callbacks=[Weights()], max_epochs=2)
    assert record.column("stage") == ["binary", "binary_2"]
    assert record.column("rate") == pytest.approx([0.05, 0.05])
    _, last, (first, states) = ends[:3]
    assert all(torch.equal(before, after) for before, after in zip(last, first, strict=True))
    assert states == 0


@pytest.mark.parametrize("first", [[], [Stage("real", epochs=1)]], ids=["from the start", "after real"])
def test_layers_enter_one_after_the_other(first):
    """Over half of four epochs, in thirds: one of three layers, two, and all of them."""
    model, before = tiny_bnn(), len(first)
    record = run(model, [*first, Stage("binary", layer_by_layer=0.5)], max_epochs=4 + before)
    of_stage = record.epochs[before:]
    assert [epoch["stage"] for epoch in of_stage] == ["to_binary"] * 2 + ["binary"] * 2
    entered = [["binary"] * count + ["real"] * (3 - count) for count in (1, 2, 3, 3)]
    assert [epoch["layers"] for epoch in of_stage] == entered
    real_activations = not first  # those of a real network; after a stage, what it had
    assert [epoch["signs"] for epoch in of_stage] == [
        [True] * count + [not real_activations] * (3 - count) for count in (1, 2, 3, 3)
    ]
    cosine = [0.05 * 0.5 * (1 + math.cos(math.pi * quarter / 4)) for quarter in range(4)]
    assert [epoch["rate"] for epoch in of_stage] == pytest.approx(cosine)


def test_the_signs_in_front_of_an_entered_layer_are_on():
    """In the order of the network, whose first layer has no sign in front, and whose shortcuts share one."""
    model = tiny_bnn(backbone="mcn8")
    model.take_stage("real", Stage("real", activations="real"))
    model.take_stage("binary", Stage("binary", layer_by_layer=0.5))
    layers = list(model.one_bit_layers)
    assert len(layers) == 9
    for count in range(1, 10):
        model.enter_layers(count)
        modules = [name for name, _ in model.net.named_modules()]
        last = modules.index(layers[count - 1])
        for name, module in model.net.named_modules():
            if isinstance(module, SignActivation):
                assert module.enabled == (modules.index(name) < last)


def test_a_run_does_not_stop_early_while_layers_enter():
    """Each validation is worse than the one before, so that two of them end the run once all layers have entered."""
    stop = EarlyStopping("val/declining", patience=2, mode="max")
    keep = ModelCheckpoint("kept", "{epoch}", monitor="val/declining", mode="max")
    more = {"callbacks": [Decline(), stop, keep], "max_epochs": 24, "enable_checkpointing": True}
    record = run(tiny_bnn(), [Stage("binary", layer_by_layer=0.5)], **more)
    assert record.column("stage") == ["to_binary"] * 8 + ["binary"] * 3
    assert sorted(path.name for path in Path("kept").iterdir()) == ["epoch=0.ckpt", "epoch=8.ckpt"]


def test_the_number_of_layers_rises_to_all_of_them():
    for share in (0.1, 0.3, 0.9):
        for epochs in (1, 3, 10, 100):
            for count in (1, 3, 18):
                stage = Stage("binary", layer_by_layer=share)
                entered = [stage.layers_entered(count, epoch, epochs) for epoch in range(epochs)]
                assert entered == sorted(entered)
                assert entered[0] >= 1
                assert entered[min(max(1, round(share * epochs)), epochs - 1)] == count


def test_a_plateau_ends_a_stage_early_and_later_ends_stay():
    model = tiny_pcnn(eta1=0.0, eta2=0.0)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 0.0
    stages = [Stage("real", epochs=4), Stage("ternary", epochs=4), Stage("binary")]
    record = run(model, stages, patience=1, max_epochs=9)
    assert record.column("stage") == ["real"] * 2 + ["ternary"] * 2 + ["binary"] * 5


def test_a_loss_begins_with_a_stage_of_the_plan():
    seen = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.setdefault(trainer.current_epoch, set()).update(outputs)

    model = tiny_bnn(center_loss_weight=1e-3, center_loss_start="binary_2")
    stages = [Stage("real", epochs=1), Stage("binary", epochs=1), Stage("binary")]
    run(model, stages, callbacks=[Look()], max_epochs=4)
    assert [epoch for epoch, names in seen.items() if "center_loss" in names] == [2, 3]


def test_projections_are_drawn_again_where_a_stage_says_so():
    drawn = []

    class Projections(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            drawn.append(next(iter(pl_module.one_bit_layers.values())).projection.clone())

    stages = [Stage("real", epochs=1), Stage("binary", epochs=1, reinit_projection=False)]
    stages += [Stage("binary", reinit_projection=True)]
    model = tiny_pcnn(reinit_projection=True, eta2=0.0)
    run(model, stages, callbacks=[Projections()], max_epochs=3, limit_train_batches=1)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


PLAN = [
    Stage("real", epochs=1, activations="real", **ADAM),
    Stage("ternary", epochs=1, kernel_weight_decay=0.0),
    Stage("binary", epochs=2, layer_by_layer=0.5),
    Stage("binary", eta1=0.01, reinit_projection=True),
]


def one_run(folder, *more, seed=0, **arguments):
    torch.manual_seed(seed)
    model = tiny_pcnn(schedule="cosine", projection_loss_weight=1e-3, eta=0.1, accumulate=2)
    used = [StagePlan(PLAN), LossCurves(), StageCheckpoint(str(folder))]
    data = tiny_digits(crop_padding=1)
    arguments |= {"max_epochs": 5, "enable_checkpointing": True, "default_root_dir": str(folder)}
    fit(model, data, callbacks=[*used, *more], **arguments)
    return model, used[1].epochs, used[2].stages


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run: real, ternary, two epochs in which layers enter the binary stage, and a warm restart."""
    return one_run(tmp_path_factory.mktemp("whole"))


class Keep(Callback):
    """Save a checkpoint after each batch, in the middle of an update or after it."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx < 3:
            trainer.save_checkpoint(self.path)


class StopAfter(Callback):
    def __init__(self, batches):
        self.batches, self.seen = batches, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.seen == self.batches:
            raise RuntimeError("killed")
        self.seen += 1


AROUND = [batches + 4 * boundary for boundary in (1, 2, 3, 4) for batches in (-1, 0, 1)]  # 4 batches an epoch
QUICK = (4, 5, 11, 12)


@pytest.mark.parametrize(
    "batches", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in AROUND]
)
def test_a_run_resumes_bit_equal_around_every_boundary(tmp_path, whole, batches):
    folder = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="killed"):
        one_run(folder, Keep(folder / "batch.ckpt"), StopAfter(batches))
    file = "last.ckpt" if batches % 4 == 0 else "batch.ckpt"
    model, curves, stages = one_run(folder, seed=1, ckpt_path=str(folder / file))
    expected, expected_curves, expected_stages = whole
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert curves == expected_curves
    assert stages == expected_stages
    assert list(stages) == ["real", "ternary", "to_binary", "binary", "binary_2"]


def test_checkpoints_know_their_stage_without_the_plan(tmp_path):
    run(tiny_bnn(), [Stage("real", epochs=1, activations="real"), Stage("binary", layer_by_layer=0.9)],
        max_epochs=3, callbacks=[StageCheckpoint(str(tmp_path))], enable_checkpointing=True)  # fmt: skip
    real = BNN.load_from_checkpoint(tmp_path / "real.ckpt")
    assert (real.stage, real.stage_name) == ("real", "real")
    assert not any(activation.enabled for activation in real.sign_activations)
    mixed = BNN.load_from_checkpoint(tmp_path / "to_binary.ckpt")
    assert (mixed.stage, mixed.stage_name) == ("binary", "to_binary")
    stages = [layer.stage for layer in mixed.one_bit_layers.values()]
    assert set(stages) == {"real", "binary"}
    assert [activation.enabled for activation in mixed.sign_activations] == [stage == "binary" for stage in stages]


def test_a_full_precision_twin_trains_as_long():
    model = tiny_pcnn(full_precision=True)
    record = run(model, [Stage("real", epochs=1), Stage("binary")], max_epochs=3)
    assert record.column("stage") == ["full_precision"] * 3


def test_a_run_of_no_epochs_is_no_mistake_of_the_plan():
    assert not run(tiny_bnn(), [Stage("real", epochs=1), Stage("binary", reinit_projection=False)], max_epochs=0).epochs


def test_a_plan_does_not_outlive_its_run():
    model, record = tiny_bnn(), Record()
    run(model, [Stage("real", epochs=1), Stage("binary", activations="real", **ADAM)], max_epochs=2)
    assert (model.stage_name, model.settings["optimizer"]) == ("binary", "adam")
    fit(model, max_epochs=2, callbacks=[record])
    assert record.column("optimizer") == ["SGD"] * 2
    assert record.column("rate") == pytest.approx([0.05, 0.025])
    assert record.column("signs") == [[False] * 3] * 2  # as the network was trained


def test_a_run_has_one_plan():
    with pytest.raises(InputError, match="a run can have one StagePlan or StageSwitch only"):
        fit(tiny_bnn(), callbacks=[StagePlan([Stage("binary")]), StageSwitch(1)])


def test_a_run_that_ends_while_layers_enter_a_stage_says_so():
    with pytest.warns(UserWarning, match="has ended before all layers have entered stage binary"):
        run(tiny_bnn(), [Stage("binary", layer_by_layer=0.9)], max_epochs=6, max_steps=5)


def test_no_loss_waits_for_a_stage_that_cannot_come():
    for start in ("binary_2", "ternary"):
        with pytest.raises(InputError, match=f"center_loss is to begin in stage {start}, but this run has no plan"):
            fit(tiny_bnn(center_loss_weight=1.0, center_loss_start=start))


def test_steps_are_not_counted_in_epochs_of_unknown_length(recwarn):
    data = tiny_digits()
    data.train_dataloader = lambda: Endless(tiny_digits().train_dataloader())
    plan = StagePlan([Stage("real", epochs=1), Stage("binary")])
    fit(tiny_bnn(), data, max_epochs=3, max_steps=6, callbacks=[plan])
    assert not [str(one.message) for one in recwarn if "ends this run" in str(one.message)]


class Endless(torch.utils.data.IterableDataset):
    """Batches of an epoch, without a length."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def test_real_kernels_are_not_taken_for_binary_ones():
    fit(tiny_pcnn(stage="real")).save_checkpoint("real.ckpt")
    for stage in ("ternary", "binary"):
        with pytest.raises(InputError, match=f"checkpoint is of a real stage, but model.stage is {stage}: to start a"):
            fit(tiny_pcnn(stage=stage), ckpt_path="real.ckpt", max_epochs=2)
    fit(tiny_pcnn(stage="binary", init_from="real.ckpt"))
    model = tiny_pcnn()
    model.set_stage("real")  # asked for, not resumed
    fit(model)
    assert model.stage == "real"


def test_layers_that_are_still_real_keep_the_projections_that_they_convolve_with():
    fit(tiny_pcnn(stage="real")).save_checkpoint("real.ckpt")
    before = torch.load("real.ckpt", weights_only=True)["state_dict"]
    model = tiny_pcnn(init_from="real.ckpt", reinit_projection=True, eta1=0.0, eta2=0.0)
    run(model, [Stage("binary", layer_by_layer=0.5)], max_epochs=2)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.endswith("projection"))


def test_a_second_fit_goes_on_in_the_last_stage():
    model, plan = tiny_bnn(), StagePlan([Stage("real", epochs=1), Stage("binary")])
    record = Record()
    trainer = fit(model, max_epochs=2, callbacks=[plan, record])
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, datamodule=tiny_digits())
    assert record.column("stage") == ["real", "binary", "binary"]


@pytest.mark.parametrize(
    ("stages", "model", "message"),
    [
        ([Stage("ternary", epochs=1), Stage("binary")], tiny_bnn, "one of real, binary for BNN, but got ternary"),
        ([Stage("binary", activations="sign")], tiny_mcn, "activations must be real for this MCN, but got sign"),
        ([Stage("binary", eta2=0.1)], tiny_bnn, "stage binary: eta2 is not an argument of BNN"),
        ([Stage("binary", reinit_projection=True)], tiny_mcn, "binary: reinit_projection is not an argument of MCN"),
        ([Stage("binary", eta1=-1.0)], tiny_bnn, "stage binary: eta1: a learning rate must be .* but got -1.0"),
        ([Stage("binary", **LAMB)], tiny_bnn, "stage binary: optimizer must be one of sgd, adam"),
        ([Stage("binary", momentum=1.0)], tiny_bnn, "stage binary: momentum must be"),
        ([Stage("binary", kernel_weight_decay=-1)], tiny_bnn, "kernel_weight_decay must be .* but got -1"),
        ([Stage("real", epochs=1), Stage("binary", epochs=1)], tiny_bnn, "end at epoch 2, but trainer.max_epochs is 3"),
        ([Stage("real", epochs=0.5), Stage("binary", epochs=9)], tiny_bnn, "end at epoch 10, but .*max_epochs is 3"),
        ([Stage("real", epochs=1), Stage("real")], lambda: tiny_bnn(center_loss_weight=1, center_loss_start="binary"),
         "center_loss is to begin in stage binary, but the stages are real, real_2"),
        ([Stage("real", epochs=1), Stage("binary")],
         lambda: tiny_bnn(center_loss_weight=1, center_loss_start="binary_2"), "stage binary_2, but the stages are"),
        ([Stage("real", epochs=3), Stage("binary")], tiny_bnn, "binary begins at epoch 3, but trainer.max_epochs is 3"),
    ],
)  # fmt: skip
def test_impossible_plans_end_in_one_line(stages, model, message):
    with pytest.raises(InputError, match=message) as caught:
        fit(model(), max_epochs=3, callbacks=[StagePlan(stages)])
    assert "\n" not in str(caught.value)


def test_wrong_plans_are_refused_where_they_are_made():
    with pytest.raises(ValueError, match="stage real must have epochs, since only the last one may take the rest"):
        StagePlan([Stage("real"), Stage("binary")])
    for last in (Stage("binary"), Stage("binary", epochs=0.5)):
        with pytest.raises(ValueError, match=r"shares of the stages leave nothing for all of them: they add up to"):
            StagePlan([Stage("real", epochs=0.5), Stage("ternary", epochs=0.5), last])
    for stages in ([], None, ["binary"]):
        with pytest.raises(ValueError, match="stages must be a list of at least one Stage"):
            StagePlan(stages)
    for arguments, message in (
        ({"stage": "quaternary"}, "stage must be one of .* but got 'quaternary'"),
        ({"stage": "binary", "epochs": 1.5}, r"epochs must be a share in \(0, 1\) or a positive whole number"),
        ({"stage": "binary", "epochs": 0}, "epochs must be a positive number, but got 0"),
        ({"stage": "binary", "layer_by_layer": 1}, r"layer_by_layer must be a number in \[0, 1\), but got 1"),
        ({"stage": "binary", "activations": "ternary"}, "activations must be one of real, sign"),
        ({"stage": "binary", "reinit_projection": 1}, "reinit_projection must be bool | None, but got 1"),
        ({"stage": "binary", "nesterov": "no"}, "nesterov must be bool | None, but got 'no'"),
        ({"stage": "binary", "reinit_projection": True, "layer_by_layer": 0.5}, "must be false with layer_by_layer"),
    ):
        with pytest.raises(ValueError, match=message):
            Stage(**arguments)


def test_a_run_is_not_continued_with_another_plan(tmp_path):
    def part(stages, **arguments):
        plan = [StagePlan(stages)] if stages else []
        used = [*plan, StageCheckpoint(str(tmp_path))]
        fit(tiny_bnn(), max_epochs=4, callbacks=used, enable_checkpointing=True, **arguments)

    with pytest.raises(RuntimeError, match="killed"):
        run(tiny_bnn(), [Stage("real", epochs=2, **ADAM), Stage("binary")], max_epochs=4, enable_checkpointing=True,
            callbacks=[StageCheckpoint(str(tmp_path)), Stop(4)])  # fmt: skip
    last = str(tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="goes through the stages real, binary: give it its stage_switch or"):
        part([], ckpt_path=last)
    with pytest.raises(InputError, match="is in stage real, but the stages of this run are binary: give it the plan"):
        part([Stage("binary")], ckpt_path=last)
    with pytest.raises(InputError, match="state of optimizer adam, which sgd cannot go on from"):
        part([Stage("real", epochs=2), Stage("binary")], ckpt_path=last)
    part([Stage("real", epochs=2, optimizer="adam", eta1=0.1), Stage("binary", weight_decay=0.0)], ckpt_path=last)
    with pytest.raises(InputError, match="goes through the stages real, binary: give it its stage_switch or"):
        part([], ckpt_path=last)  # whose last stage has settings of its own
