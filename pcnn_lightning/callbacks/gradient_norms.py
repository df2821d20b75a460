"""How large the two gradients are, and at which rates they are followed."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from pcnn_lightning.stages import STAGES


class GradientNorms(Callback):
    """Log the norm of an update's gradient, its learning rates and its stage.

    ``gradient_norm/kernels`` and ``gradient_norm/projections`` (``modulations`` of an MCN) are Euclidean norms over
    all parameters that learn with η₁ or η₂, accumulated, averaged over processes and unscaled, before clipping. With
    η > 0 over several micro-batches or processes, the term quadratic in η is not yet in them. ``lr/kernels_step``,
    ``lr/projections_step`` and ``stage_step`` stand beside them, where ``lr/kernels`` is of an epoch's end.

    Only each ``trainer.log_every_n_steps``-th update is measured: reading a value waits for the device.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not trainer.loggers or every < 1 or (trainer.global_step + 1) % every:
            return
        groups = {}
        for index, group in enumerate(optimizer.param_groups):
            name = group.get("name", str(index))
            name = getattr(pl_module, "second_rate", name) if name == "projections" else name
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:  # a full-precision network has no projections
                groups[name] = (torch.nn.utils.get_total_norm(gradients), group["lr"])
        if not groups:
            return
        norms = torch.stack([norm for norm, _ in groups.values()]).tolist()  # waits for the device once
        values = {f"gradient_norm/{name}": norm for name, norm in zip(groups, norms, strict=True)}
        values |= {f"lr/{name}_step": float(rate) for name, (_, rate) in groups.items()}
        if (stage := getattr(pl_module, "stage", None)) in STAGES:
            values["stage_step"] = float(STAGES[stage])
        for logger in trainer.loggers:
            # Not pl_module.log, which writes at a batch of its own choice, and not at one that ends an update.
            logger.log_metrics(values, step=trainer.fit_loop.total_batch_idx)
