"""Which classes a test takes for which."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from pcnn_lightning.callbacks.drawing import DrawingCallback

NAMED, COUNTED = 50, 20
"""Most classes whose names, and whose numbers of images, are in the figure."""


class ConfusionMatrix(DrawingCallback):
    """Write the confusion matrix of a test and the accuracy of each class.

    In the folder of the run, ``confusion_<stage>.csv`` has a row for each class and a column for each class that is
    predicted, with numbers of images; ``per_class_<stage>.csv`` has images, correct ones and accuracy of each class,
    empty for a class without images; ``confusion_<stage>.png`` is a picture of the matrix, which TensorBoard shows as
    well. A later test in the same stage replaces them. All processes count together, and the first one writes.

    The module's ``test_step`` must return ``labels`` and ``predictions``, each (B,), as those of this package do; after
    tests of others nothing is written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: Tensor | None = None  # (C, C), true and predicted class of each image, on the device

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        classes = pl_module.hparams.get("num_classes")
        self._counts = (
            None if classes is None else torch.zeros(classes, classes, dtype=torch.int64, device=pl_module.device)
        )

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counts is not None and isinstance(outputs, Mapping) and "predictions" in outputs:
            # Neither torch's bincount, which waits for the device, nor torchmetrics', which takes B · C² numbers of
            # memory in deterministic runs.
            labels = outputs["labels"]
            self._counts.index_put_((labels, outputs["predictions"]), torch.ones_like(labels), accumulate=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found, self._counts = self._counts, None
        self.begin_test(trainer)
        if found is None:
            return
        counts = trainer.strategy.reduce(found, reduce_op="sum").cpu()
        if not counts.any():  # the module does not say what it predicts
            return
        names = getattr(trainer.datamodule, "classes", None) or []  # type: ignore[attr-defined]
        classes = names if len(names) == len(counts) else [str(label) for label in range(len(counts))]
        correct, images = counts.diag(), counts.sum(dim=1)
        stage = str(pl_module.stage_name)
        self.write(
            f"confusion_{stage}",
            [
                {"true/predicted": name, **dict(zip(classes, row, strict=True))}
                for name, row in zip(classes, counts.tolist(), strict=True)
            ],
        )
        self.write(
            f"per_class_{stage}",
            [
                {"class": name, "images": n, "correct": right, "accuracy": right / n if n else None}
                for name, n, right in zip(classes, images.tolist(), correct.tolist(), strict=True)
            ],
        )
        title = f"{stage} stage, {int(correct.sum())} of {int(images.sum())} test images correct"
        figure = draw_confusion(counts, classes, title)
        self.show("confusion", figure, trainer.fit_loop.total_batch_idx, file=f"confusion_{stage}")


def draw_confusion(counts: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix: the share of each class's images by predicted class, and their numbers if few classes.

    Args:
        counts: (C, C) integers, true by predicted class.
        classes: C names.
        title: title of the figure.
    """
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = 3 + 0.4 * min(len(classes), NAMED)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    axes.set_title(title, fontsize="medium")
    drawn = axes.imshow(100 * shares.numpy(), cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(drawn, ax=axes, label="share of the true class (%)")
    if len(classes) <= NAMED:
        # Dollar signs would begin a formula.
        names = [name.encode(errors="backslashreplace").decode().replace("$", r"\$")[:30] for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classes) <= COUNTED:
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            count = str(int(counts[row, column]))
            axes.text(column, row, count, ha="center", va="center", fontsize="small", color=colour)
    return figure
