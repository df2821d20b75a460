"""Gradient norms and learning rates of individual updates."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class GradientNorms(Callback):
    """Log the gradient norms and learning rates of an update.

    ``gradient_norm/<group>`` is the Euclidean norm over a group of parameters: the latent ``kernels`` and the
    ``others``, learned at η₁, or the second parameters, learned at η₂ (such as ``projections`` of PCNN or
    ``modulations`` of MCN). Gradients are accumulated, averaged over processes and unscaled, but not yet clipped. In
    PCNN with η > 0 over several micro-batches or processes, they do not yet include the term quadratic in η.
    ``lr/kernels``, η₁, and that of the second parameters, η₂, belong to the same update; the module logs them at the
    end of every epoch.

    Only every ``trainer.log_every_n_steps``-th update is measured, since reading a value synchronizes with the device.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not trainer.loggers or every < 1 or (trainer.global_step + 1) % every:
            return
        groups = {}
        for index, group in enumerate(optimizer.param_groups):
            name = group.get("name", str(index))
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:  # a group may be frozen
                groups[name] = (torch.nn.utils.get_total_norm(gradients), group["lr"])
        if not groups:
            return
        norms = torch.stack([norm for norm, _ in groups.values()]).tolist()  # synchronizes with the device once
        values = {f"gradient_norm/{name}": norm for name, norm in zip(groups, norms, strict=True)}
        rates = getattr(pl_module, "learning_rates", groups)  # once, where several groups share one
        values |= {f"lr/{name}": float(rate) for name, (_, rate) in groups.items() if name in rates}
        for logger in trainer.loggers:
            # Not pl_module.log, which chooses the batches it logs at, not those that end an update.
            logger.log_metrics(values, step=trainer.fit_loop.total_batch_idx)
