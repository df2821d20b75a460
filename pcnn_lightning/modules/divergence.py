"""Ends a run whose loss is no longer finite."""

import math

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from pcnn_lightning.errors import DivergedError


class DivergenceWatch:
    """Remembers the first step whose loss was NaN or infinite, without waiting for the device."""

    def __init__(self) -> None:
        self._first_step: Tensor | None = None  # on the device; infinite as long as all is well
        self._message: str | None = None

    def watch(self, loss: Tensor, step: int) -> None:
        """Look at the loss of ``step``."""
        bad = torch.where(loss.detach().isfinite(), math.inf, float(step))
        self._first_step = bad if self._first_step is None else torch.minimum(self._first_step, bad)

    def check(self, module: LightningModule) -> None:
        """Wait for the device and see whether all watched losses were finite.

        Raises:
            DivergedError: if one was not.
        """
        first = torch.tensor(math.inf, device=module.device) if self._first_step is None else self._first_step
        self._first_step = None
        # The minimum over all processes, so that they end together.
        step = float(module.trainer.strategy.reduce(first, reduce_op="min"))
        if step < math.inf:
            self.fail(module, f"the loss became NaN or infinite at step {int(step)}")

    def check_state(self, module: LightningModule) -> None:
        """Also see whether all tensors to be saved are finite.

        Raises:
            DivergedError: if one is not.
        """
        self.check(module)
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                self.fail(module, f"{name} holds NaN or infinite values")

    def fail(self, module: LightningModule, what: str) -> None:
        """End the run with what can be done about it and the last good checkpoint.

        Raises:
            DivergedError: always, with the same message if a callback then tries to save the model.
        """
        if self._message is None:
            callback = module.trainer.checkpoint_callback
            kept = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
            rates = [f"{name} (now {module.hparams[name]})" for name in ("eta1", "eta2") if name in module.hparams]
            self._message = (
                f"{what} (epoch {module.current_epoch}, {module.stage} stage). Lower {' or '.join(rates)}, "
                f"or set gradient_clip. Last good checkpoint: {kept or 'none yet'}"
            )
        raise DivergedError(self._message)
