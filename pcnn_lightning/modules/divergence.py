"""Ends a run whose loss is no longer finite."""

import math
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from pcnn_lightning.errors import DivergedError
from pcnn_lightning.stages import StagedModule


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
            kept = last_checkpoint(module.trainer)
            settings = cast(StagedModule, module).settings
            rates = [f"{name} (now {settings[name]})" for name in ("eta1", "eta2") if name in settings]
            self._message = (
                f"{what} (epoch {module.current_epoch}, {module.stage_name} stage). Lower {' or '.join(rates)}, "
                f"or set gradient_clip. Last good checkpoint: {kept or 'none yet'}"
            )
        raise DivergedError(self._message)


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint of a run; None if there is none yet."""
    written: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        # Lightning names a file before it writes it, and then no longer knows the best one that is still there.
        names = ("last_model_path", "best_model_path", "_last_checkpoint_saved")
        paths = (getattr(callback, name, "") for name in names)
        written += [Path(path) for path in (*paths, *getattr(callback, "files", ())) if path and Path(path).is_file()]
    return max(written, key=lambda path: path.stat().st_mtime, default=None)
