"""Mixed precision."""

import math
from functools import partial

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import fit, tiny_pcnn


def test_a_scaled_loss_changes_nothing_but_an_overflow_skips_the_update():
    """16-mixed needs a GPU to compute in float16, but its scaler works on any device."""

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
