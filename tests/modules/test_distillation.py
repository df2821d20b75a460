"""Training with a teacher."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny import PROGRESSIVE, Save, Stop, TinyNetwork, fit, frozen_norm, tiny_digits, tiny_mcn, tiny_pcnn, tiny_trainer
from torch import nn
from torch.nn import functional as F

from pcnn_lightning import LossCurves, StageSwitch
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules.teacher import load_teacher

TEACHER = "teacher.ckpt"


def write_teacher(path=TEACHER, tiny=tiny_mcn, **arguments):
    """Train a teacher of another family for some steps, and save it."""
    torch.manual_seed(7)
    model = tiny(**arguments)
    fit(model).save_checkpoint(path)
    return model.eval()


def trained_network(num_classes, in_channels):
    torch.manual_seed(3)  # which must not reach the run
    return TinyNetwork(num_classes, in_channels).train()


def student(**arguments):
    return tiny_pcnn(**{"teacher": TEACHER, "temperature": 4.0, "task_loss_weight": 0.5, **arguments})


class Record(Callback):
    """Keep the initial weights, the batches and the losses of a run, and what the teacher computes."""

    def on_train_start(self, trainer, pl_module):
        self.initial = copy.deepcopy(pl_module.state_dict())
        self.batches: list[Any] = []
        self.losses: list[Any] = []
        self.parameters = [parameter.shape for parameter in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.losses.append(outputs)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.parametrize("kind", ["checkpoint", "function"])
def test_a_teacher_is_no_part_of_the_run_but_for_its_term_of_the_loss(kind):
    """Batch by batch, the loss is that of the teacher's logits in evaluation mode; all else is as without it."""
    if kind == "checkpoint":
        name, expected = TEACHER, write_teacher()
    else:
        name, expected = f"{__name__}.trained_network", trained_network(10, 1).eval()

    class Check(Record):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = copy.deepcopy(pl_module)  # as averaged weights copy it

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            images, _ = batch
            with torch.no_grad():
                taught = (expected(images) / 4).softmax(dim=1)
                loss = 16 * F.cross_entropy(self.before.train()(images) / 4, taught)
            torch.testing.assert_close(outputs["distill_loss"], loss, rtol=1e-5, atol=1e-6)
            total = sum(value for name, value in outputs.items() if name != "loss")
            torch.testing.assert_close(outputs["loss"], total, rtol=1e-5, atol=0)

    runs = []
    for teacher, callback in ((name, Check()), (None, Record())):
        torch.manual_seed(0)
        model = student(teacher=teacher)
        trainer = fit(model, tiny_digits(crop_padding=1), callbacks=[callback], max_epochs=2)
        runs.append((model, callback, trainer.callback_metrics))
    (model, taught, metrics), (_, alone, _) = runs
    assert same(taught.initial, alone.initial)
    assert taught.parameters == alone.parameters
    for one, other in zip(taught.batches, alone.batches, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert {"train/distill_loss", "val/cross_entropy"} <= metrics.keys()
    assert "val/distill_loss" not in metrics
    total = metrics["val/cross_entropy"] + metrics["val/projection_loss"]
    torch.testing.assert_close(metrics["val/loss"], total, rtol=1e-5, atol=0)
    assert model.twin().hparams["teacher"] is None


@pytest.mark.parametrize(("batches", "file"), [(2, "batch"), (8, "epoch")])  # 4 per epoch, the switch is at 8
def test_a_resumed_run_ends_bit_equal(batches, file):
    write_teacher()

    def run(*more, seed=0, **arguments):
        torch.manual_seed(seed)
        model, curves = student(**PROGRESSIVE), LossCurves()
        callbacks = [StageSwitch(2), EMAWeightAveraging(), curves, *more]
        fit(model, tiny_digits(crop_padding=1), max_epochs=3, callbacks=callbacks, **arguments)
        return model.state_dict(), curves.epochs

    whole, epochs = run()
    with pytest.raises(RuntimeError, match="killed"):
        run(Save(), Stop(batches))
    resumed, rest = run(seed=1, ckpt_path=f"{file}.ckpt")
    assert same(resumed, whole)
    assert rest == epochs
    assert all("train/distill_loss" in row and "val/distill_loss" not in row for row in epochs)


def test_only_training_needs_the_file_of_the_teacher():
    write_teacher()
    model = student()
    fit(model).save_checkpoint("student.ckpt")
    Path(TEACHER).unlink()
    trainer = tiny_trainer()
    loaded = type(model).load_from_checkpoint("student.ckpt")
    (metrics,) = trainer.test(loaded, datamodule=tiny_digits(), verbose=False)
    assert metrics["test/loss"] == pytest.approx(metrics["test/cross_entropy"] + float(quantization(loaded)), rel=1e-5)
    for again in (student(), loaded):
        with pytest.raises(InputError, match=r"^teacher: there is no checkpoint teacher\.ckpt$"):
            fit(again, ckpt_path="student.ckpt", max_epochs=2)


def quantization(model):
    return sum(layer.quantization_loss() for layer in model.one_bit_layers.values())


def test_teachers_that_do_not_fit_are_refused_by_name(monkeypatch):
    write_teacher("other.ckpt", num_classes=12)
    Path("damaged.ckpt").write_bytes(Path("other.ckpt").read_bytes()[:5000])
    for name, said in {
        "other.ckpt": "it must be a network for 10 classes and 1 channels, but other.ckpt is for 12 classes and 1 chan",
        "damaged.ckpt": r"damaged\.ckpt is damaged or no checkpoint: it cannot be read",
        "torchvision/resnet18": "it must be .* 10 classes and 1 channels, but torchvision/resnet18 is for 1000 classes",
        "torchvision/resnet19": "torchvision has no resnet19",
        "no_package.build": r"no_package\.build cannot be imported",
        "resnet18": "there is no checkpoint resnet18",
    }.items():
        with pytest.raises(InputError, match=f"^teacher: {said}"):
            load_teacher(name, 10, 1)
    monkeypatch.setattr(sys.modules[__name__], "trained_network", lambda **_: nn.Flatten())
    with pytest.raises(InputError, match=r"teacher must return logits of shape \(16, 10\), but returns \(16, 64\)"):
        fit(student(teacher=f"{__name__}.trained_network"))
    with pytest.raises(ValueError, match="distill_loss_weight or task_loss_weight must be positive, but both are 0"):
        student(distill_loss_weight=0, task_loss_weight=0)


def test_the_teacher_has_nothing_to_do_before_its_term_begins():
    write_teacher()
    epochs = []

    class Count(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module._teacher.network.register_forward_hook(lambda *_: epochs.append(trainer.current_epoch))

    torch.manual_seed(0)
    fit(student(distill_loss_start=2), max_epochs=4, callbacks=[Count()])
    assert epochs == [2] * 4 + [3] * 4
    with pytest.raises(
        InputError, match=r"task_loss_weight must be positive until distill_loss begins \(2\), but got 0"
    ):
        fit(student(distill_loss_start=2, task_loss_weight=0))


def train_in_double(batch_size: int, accumulate: int, *callbacks: Callback, **trainer: Any) -> dict[str, Any]:
    """Without batch statistics, so that a large batch equals several small ones."""
    torch.manual_seed(0)
    model = student(accumulate=accumulate, task_loss_weight=0.3, distill_loss_weight=2.0).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0
            layer.forward = partial(frozen_norm, layer)  # type: ignore[method-assign]
    data: Any = tiny_digits(batch_size=batch_size)
    normalised = data.on_after_batch_transfer
    data.on_after_batch_transfer = lambda batch, index: [
        part.double() if part.is_floating_point() else part for part in normalised(batch, index)
    ]
    fit(model, data, max_epochs=2, callbacks=list(callbacks), **trainer)
    return model.state_dict()


def test_accumulation_equals_one_batch_of_the_whole_size():
    write_teacher()
    whole, parts = train_in_double(32, 1), train_in_double(8, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.slow
def test_two_processes_follow_one(tmp_path):
    write_teacher()
    results = {}
    for processes in (1, 2):
        command = [sys.executable, __file__, str(processes)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
        subprocess.run(command, check=True, timeout=300, cwd=tmp_path, env=environment)
        results[processes] = [torch.load(tmp_path / f"{processes}-{rank}.pt") for rank in range(processes)]
    (whole,), (first, second) = results[1], results[2]
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-8, msg=name)


def test_mixed_precision_and_compilation_change_little(monkeypatch):
    """The teacher is compiled as well, once."""
    write_teacher()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    losses = []
    for arguments in ({}, {"compile": True, "channels_last": True}, {"precision": "bf16-mixed"}):
        trainer = {"precision": arguments.pop("precision")} if "precision" in arguments else {}
        record = Record()
        torch.manual_seed(0)
        fit(student(**arguments), callbacks=[record], limit_train_batches=2, **trainer)
        losses.append([float(one["distill_loss"]) for one in record.losses])
        assert record.losses[0]["distill_loss"].dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=3e-2)
    assert len(graphs) == 2, "one of the network and one of its teacher"


class KeepWeights(Callback):
    """Save the final weights of each process."""

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{trainer.world_size}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    several = {"devices": 2, "strategy": "ddp"} if sys.argv[1] == "2" else {}
    train_in_double(16 // int(sys.argv[1]), 1, KeepWeights(), **several)
