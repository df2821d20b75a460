"""The progress bar."""

import torch
from tiny import fit, tiny_pcnn

from pcnn_lightning import StageSwitch
from pcnn_lightning.callbacks import StageProgressBar


def test_progress_bar_shows_stage_rates_and_metrics_without_waiting_for_the_device():
    shown = []

    class Bar(StageProgressBar):
        def get_metrics(self, trainer, pl_module):
            shown.append(super().get_metrics(trainer, pl_module))
            return shown[-1]

    model = tiny_pcnn(stage="ternary", eta1=0.05, eta2=0.01)
    fit(
        model,
        max_epochs=2,
        callbacks=[Bar(), StageSwitch(1)],
        enable_progress_bar=True,
        log_every_n_steps=2,
    )
    assert not any(isinstance(value, torch.Tensor) for metrics in shown for value in metrics.values())
    assert "loss" not in shown[0]  # after one batch of two
    assert float(shown[1]["loss"]) > 0
    assert (shown[1]["η₁"], shown[1]["η₂"]) == ("0.05", "0.01")
    assert [metrics["stage"] for metrics in (shown[0], shown[-1])] == ["ternary", "binary"]
    assert "accuracy" in shown[-1]
