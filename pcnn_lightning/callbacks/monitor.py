"""The metric by which a callback decides."""

from lightning.pytorch import Callback, Trainer

from pcnn_lightning.errors import InputError


def monitored(callback: Callback, trainer: Trainer, monitor: str | None) -> float:
    """The value of a metric in the first process, so that all of them decide alike.

    Raises:
        InputError: if it is not logged.
    """
    if monitor is None or monitor not in trainer.callback_metrics:
        name, known = type(callback).__name__, ", ".join(sorted(trainer.callback_metrics))
        raise InputError(f"{name} cannot watch {monitor}, which is not logged; there is {known}")
    return trainer.strategy.broadcast(float(trainer.callback_metrics[monitor]))
