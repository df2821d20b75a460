"""Where the figures of a run go."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""


class DrawingCallback(Callback):
    """Shows figures in TensorBoard and writes them as PNG files into the folder of the run's logs.

    Only the first process draws and writes; ``folder`` and ``writers`` are empty on the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None
        self.writers: list[SummaryWriter] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Asked for here, by all processes, because it is broadcast: at an exception they are no longer in step.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.folder = folder
            self.writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]

    def show(self, name: str, figure: Figure, epoch: int) -> None:
        """Write ``figure`` to ``name``.png, and to TensorBoard under "Images"."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"{name}.png")
        for writer in self.writers:
            writer.add_figure(name, figure, epoch)
