import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import fit, tiny_mcn, tiny_pcnn

from pcnn_lightning import StageSwitch
from pcnn_lightning.callbacks.gradient_norms import GradientNorms


class KeepGradients(Callback):
    """Record the norms and rates of each update before clipping."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        flat = [
            np.concatenate([p.grad.double().numpy().ravel() for p in group["params"] if p.grad is not None] or [[]])
            for group in optimizer.param_groups
        ]
        self.norms.append([float(np.sqrt((values**2).sum())) for values in flat])
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def read(logger, tag):
    events = EventAccumulator(logger.log_dir).Reload()
    return {event.step: event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}


@pytest.mark.parametrize(
    ("family", "arguments", "second"),
    [
        (tiny_pcnn, {"schedule": "cosine", "stage": "ternary"}, "projections"),
        (tiny_pcnn, {"schedule": "cosine", "stage": "ternary", "gradient_clip": 1e-3}, "projections"),
        (tiny_mcn, {"schedule": "exponential", "decay": 0.5, "projection_decay": 0.1}, "modulations"),
    ],
    ids=["PCNN", "clipped", "MCN"],
)
def test_every_nth_update_is_logged(tmp_path, family, arguments, second):
    logger, keep = TensorBoardLogger(tmp_path, name="run"), KeepGradients()
    callbacks = [StageSwitch(2), GradientNorms(), keep]
    model = family(**arguments)
    fit(model, max_epochs=3, callbacks=callbacks, logger=logger, log_every_n_steps=3)
    steps = [2, 5, 8, 11]  # 4 updates per epoch, the switch is at 8
    for group, name in enumerate(("kernels", second)):
        norms = {step: pytest.approx(keep.norms[step][group], rel=1e-5) for step in steps}
        assert read(logger, f"gradient_norm/{name}") == norms
        rates = {step: pytest.approx(keep.rates[step][group], rel=1e-6) for step in steps}
        assert {step: rate for step, rate in read(logger, f"lr/{name}").items() if step in steps} == rates
    if "gradient_clip" in arguments:
        assert min(read(logger, "gradient_norm/kernels").values()) > 1e-3
    assert list(read(logger, "lr/kernels")) == [2, 3, 5, 7, 8, 11], "the module logs the ends of epochs"


def test_accumulated_gradient_is_logged_at_its_last_batch(tmp_path):
    logger, keep = TensorBoardLogger(tmp_path, name="run"), KeepGradients()
    model = tiny_pcnn(accumulate=3)  # 4 batches an epoch: updates end at batches 2, 3, 6, 7, 10 and 11
    fit(model, max_epochs=3, callbacks=[GradientNorms(), keep], logger=logger, log_every_n_steps=2)
    assert len(keep.norms) == 6
    expected = {batch: pytest.approx(keep.norms[update][0]) for update, batch in ((1, 3), (3, 7), (5, 11))}
    assert read(logger, "gradient_norm/kernels") == expected


def test_only_logged_updates_are_measured(tmp_path, monkeypatch):
    measured = []
    measure = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: measured.append(len(grads)) or measure(grads))
    logger = CSVLogger(tmp_path)
    fit(tiny_pcnn(), max_epochs=3, callbacks=[GradientNorms()], logger=logger, log_every_n_steps=5)
    assert len(measured) == 3 * 2, "the three groups of updates 4 and 9"
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "gradient_norm/kernels" in rows.splitlines()[0], "works with any logger"


@pytest.mark.parametrize("point", ["epoch", "batch"])
def test_resumed_run_continues_the_steps(tmp_path, point):
    def run(name, max_epochs, **arguments):
        torch.manual_seed(0)
        logger = TensorBoardLogger(tmp_path, name=name)
        keep = ModelCheckpoint(tmp_path, "epoch", save_on_train_epoch_end=True, enable_version_counter=False)
        if point == "batch":
            keep = ModelCheckpoint(tmp_path, "batch", every_n_train_steps=6, enable_version_counter=False)
        callbacks = [GradientNorms(), keep]
        shared = {"logger": logger, "log_every_n_steps": 3, "enable_checkpointing": True}
        fit(tiny_pcnn(), max_epochs=max_epochs, callbacks=callbacks, **shared, **arguments)
        return read(logger, "gradient_norm/projections")

    whole = run("whole", 3)
    run("first", 2)
    resumed = run("second", 3, ckpt_path=str(tmp_path / f"{point}.ckpt"))
    assert list(whole) == [2, 5, 8, 11]
    assert resumed == {step: pytest.approx(whole[step]) for step in (8, 11)}


def test_a_full_precision_network_has_one_gradient(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tiny_pcnn(full_precision=True), callbacks=[GradientNorms()], logger=logger, log_every_n_steps=2)
    assert list(read(logger, "gradient_norm/kernels")) == [1, 3]
    assert read(logger, "gradient_norm/projections") == read(logger, "lr/projections") == {}


@pytest.mark.parametrize("trainer", [{}, {"fast_dev_run": True}])
def test_no_files_without_a_logger(tmp_path, trainer):
    fit(tiny_pcnn(), callbacks=[GradientNorms()], log_every_n_steps=1, **trainer)
    assert not list(tmp_path.iterdir())
