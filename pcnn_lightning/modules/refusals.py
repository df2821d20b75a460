"""Trainer settings that do not work with kernels that are learned latently, or under manual optimization."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from pcnn_lightning.errors import InputError


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would train wrongly or do nothing without a word.

    Raises:
        InputError: names the setting, and what to use instead.
    """
    if any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise InputError("LearningRateFinder does not know eta1 and eta2: set them yourself")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, StochasticWeightAveraging):
            raise InputError(f"{name} does not work under manual optimization: use EMAWeightAveraging")
        if isinstance(callback, WeightAveraging) and not callback.should_update(step_idx=0):
            raise InputError(
                f"{name} would validate and save the untrained network until its first update, which must come with "
                "the first step: leave out update_starting_at_step"
            )
    if trainer.precision in ("16-true", "bf16-true"):
        raise InputError(
            f"trainer.precision {trainer.precision} would round the latent weights: use 32-true, bf16-mixed or 16-mixed"
        )
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise InputError(
            f"trainer.strategy {type(trainer.strategy).__name__} shards the kernels, but a layer needs all of its "
            "kernels for its scale: use ddp"
        )
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "_train_time_interval", None) is not None:
            raise InputError(
                "ModelCheckpoint(train_time_interval=...) writes nothing under manual optimization: "
                "set every_n_train_steps or every_n_epochs"
            )
