"""Two gloo processes with half the batch each, against one process with the whole batch."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import Save, frozen_norm, tiny_digits, tiny_mcn, tiny_pcnn, tiny_trainer
from torch import nn
from torch.distributed.nn.functional import all_reduce

from pcnn_lightning import ConfusionMatrix, LossCurves, StageCheckpoint, StagePlan, StageSwitch
from pcnn_lightning.stages import Stage


class KeepWeights(Callback):
    """Save the final weights of each process."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), Path(self.folder, f"rank{trainer.global_rank}.pt"))


def synchronised_norm(layer, x):
    """Batch norm over the batches of all processes, as SyncBatchNorm does, which torch has on GPUs only."""
    if not layer.training:
        return frozen_norm(layer, x)
    moments = torch.stack([x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))])
    count = x.numel() // x.shape[1]
    if torch.distributed.is_initialized():
        moments = all_reduce(moments) / torch.distributed.get_world_size()
        count *= torch.distributed.get_world_size()
    mean, variance = moments[0], moments[1] - moments[0].square()
    with torch.no_grad():
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance * count / (count - 1), layer.momentum)
    normal = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + layer.eps).sqrt()
    return normal * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)


MIXED: dict[str, dict[str, Any]] = {
    "PCNN": {"random_erasing": 0.5, "mixup_alpha": 0.4, "cutmix_alpha": 1.0},
    "MCN": {"mixup_alpha": 0.4, "weighted_sampling": True},
}
PLAN = [
    Stage("real", epochs=1, activations="real", optimizer="adam", eta1=0.002),
    Stage("ternary", epochs=1, kernel_weight_decay=0.0, reinit_projection=True),
    Stage("binary", layer_by_layer=0.5),
]


def train(folder: str, processes: int, family: str, accumulate: int) -> None:
    torch.manual_seed(0)
    shared = {"center_loss_weight": 0.01, "accumulate": accumulate, "schedule": "cosine"}
    model: Any
    if family in ("PCNN", "plan"):
        model = tiny_pcnn(stage="ternary", reinit_projection=True, eta=0.3, projection_loss_weight=0.1, **shared)
    elif family == "converted":
        model = tiny_pcnn(
            network="tiny.TinyNetwork",
            widths=None,
            projections=1,
            convert={"include": "re:main|last", "activations": "threshold"},
            **{**shared, "stage": "ternary"},
        )
    else:
        model = tiny_mcn(levels=3, filter_loss_weight=0.1, **shared)
    model = model.double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            # Micro-batches have statistics of their own, on whatever number of processes.
            layer.forward = partial(synchronised_norm if accumulate == 1 else frozen_norm, layer)  # type: ignore[method-assign]
    # 145 validation images do not divide evenly.
    batch_size = 16 // processes // accumulate
    data: Any = tiny_digits(batch_size=batch_size, crop_padding=1, val_fraction=0.1009, **MIXED.get(family, {}))
    normalised = data.on_after_batch_transfer
    data.on_after_batch_transfer = lambda batch, index: [
        part.double() if part.is_floating_point() else part for part in normalised(batch, index)
    ]
    stages = StagePlan(PLAN) if family == "plan" else StageSwitch(2)
    callbacks = [stages, LossCurves(), ConfusionMatrix(), StageCheckpoint(folder), KeepWeights(folder)]
    several: dict[str, Any] = {"devices": processes, "strategy": "ddp"} if processes > 1 else {}
    trainer: Any = tiny_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True, **several)
    trainer.run_folder = Path(folder)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("family", ["PCNN", "MCN", "converted", "plan"])
def test_two_processes_follow_one_over_the_switch(tmp_path, family, accumulate):
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        command = [sys.executable, __file__, str(folder), str(processes), family, str(accumulate)]
        subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
        results[processes] = [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]
    (whole,), (first, second) = results[1], results[2]
    records = [json.loads((tmp_path / processes / "stages.json").read_text()) for processes in "12"]
    assert records[0] == records[1]  # the validation metrics of both
    (alone,), (both,) = (list((tmp_path / processes).glob("confusion_*.csv")) for processes in "12")
    assert alone.read_text() == both.read_text()
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(
            first[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def train_with_dropout(folder: str, max_steps: int, seed: int, ckpt_path: str | None) -> None:
    """Train two processes, whose random numbers differ, and save checkpoints."""
    several: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    trainer = tiny_trainer(max_epochs=2, max_steps=max_steps, callbacks=[KeepWeights(folder), Save()], **several)
    torch.manual_seed(seed + trainer.global_rank)
    trainer.fit(tiny_mcn(dropout=0.3), tiny_digits(batch_size=8), ckpt_path=ckpt_path)


@pytest.mark.slow
@pytest.mark.parametrize(("batches", "file"), [(2, "batch"), (4, "epoch")])  # 4 per epoch
def test_two_processes_with_dropout_resume_bit_equal(tmp_path, batches, file):
    def run(name, *arguments):
        (tmp_path / name).mkdir()
        command = [sys.executable, __file__, "dropout", str(tmp_path / name), *map(str, arguments)]
        subprocess.run(command, check=True, timeout=300, cwd=tmp_path / name)
        return [torch.load(tmp_path / name / f"rank{rank}.pt") for rank in range(2)]

    whole = run("whole", -1, 0)
    run("first", batches, 0)
    resumed = run("second", -1, 5, tmp_path / "first" / f"{file}.ckpt")
    for rank in range(2):
        for name, value in whole[rank].items():
            if rank == 0 or "running" not in name:  # a checkpoint has the batch statistics of the first process
                assert torch.equal(resumed[rank][name], value), name


CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
LAUNCHERS = {
    "Trainer flags": [sys.executable, "-m", "pcnn_lightning"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        *("-m", "pcnn_lightning"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["Trainer flags", "torchrun"])
def test_both_ways_to_start_two_processes_write_everything_once(tmp_path, launcher):
    flags = ["fit", f"--config={CONFIG}", "--trainer.max_epochs=2", "--data.init_args.batch_size=16"]
    flags += ["--trainer.limit_train_batches=4", "--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [*LAUNCHERS[launcher], *flags]
    ended = subprocess.run(command, check=False, timeout=300, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Compression: ") == 1
    assert ended.stdout.count("stage    best val/accuracy") == 1
    (logs,) = (tmp_path / "runs" / "digits").iterdir()
    assert logs.name == "version_0"
    files = [path.parent for path in logs.rglob("events.*")]
    assert files, "TensorBoard's"
    assert len(files) == len(set(files)), "one in each sub-run, by the first process"
    assert {path.name for path in (logs / "checkpoints").iterdir()} == {
        "ternary.ckpt",
        "binary.ckpt",
        "last.ckpt",
        "stages.json",
    }


if __name__ == "__main__":
    if sys.argv[1] == "dropout":
        train_with_dropout(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] if sys.argv[5:] else None)
    else:
        train(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
