"""Diversity of the kernels that are made from one latent kernel, and their feature maps."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from pcnn_lightning.callbacks.drawing import DrawingCallback, choose_layers, stage_of
from pcnn_lightning.checks import check_integer
from pcnn_lightning.errors import InputError
from pcnn_lightning.functional import sign
from pcnn_lightning.layers import QuantizedConv2d


@dataclass
class View:
    """What a layer computes for one image at the end of an epoch.

    Attributes:
        stage: the stage in that epoch.
        epoch: index of the epoch; -1 before training.
        batch: index of the last batch, as loggers count them.
        kernels: (n, kh, kw), the first input channel of the first n kernels.
        maps: (n, H, W), the feature maps of these kernels.
    """

    stage: str
    epoch: int
    batch: int
    kernels: Tensor
    maps: Tensor


class Diversity(DrawingCallback):
    """Draw the kernels made from one latent kernel, their feature maps and the signs of the maps (figure 3.17).

    At the end of each stage and of training, or if training is interrupted, the figure is written to
    ``diversity_<stage>.png`` in the log folder and to TensorBoard as the image ``diversity``. It shows the end of the
    last complete epoch. If ``layer`` is given, there is a figure of each layer that it names, with its name appended to
    ``diversity``. The kernels drawn are the planes of the first latent kernel (for example, D_j of PCNN or Q_k of MCN)
    or, if the layer has one plane, its first kernels; only the first input channel of each is drawn.

    If the layer has several planes, :func:`kernel_diversity` of all its kernels is logged every epoch as
    ``diversity/<layer>``.

    The image is seen as in evaluation: if the dataset has a method ``unaugmented``, as those of this package do, the
    image is taken from the dataset that it returns, otherwise from the dataset itself. Only the first process draws.
    The network, its buffers, the random state and pending losses are left unchanged. The cost is a forward pass of one
    image per epoch. A network without 1-bit layers produces no output.

    Args:
        layer: path of a layer in ``model.net``, such as ``features.stage1.0.conv``, or a pattern of several, such as
            ``features.stage*.0.conv``; None takes the first 1-bit layer.
        image: index of the image in the validation set, or in the training set if there is none.
        channels: maximum number of channels to draw.

    Raises:
        ValueError: if ``image`` or ``channels`` is too small.
        InputError: when training starts, if there is no such layer or image.
    """

    def __init__(self, layer: str | None = None, image: int = 0, channels: int = 4) -> None:
        super().__init__()
        check_integer("image", image, 0)
        check_integer("channels", channels, 1)
        self.layer, self.image, self.channels = layer, image, channels
        self.views: dict[str, View] = {}  # by layer
        self._chosen: Mapping[str, QuantizedConv2d] = {}
        self._image = torch.empty(0)  # (1, C, H, W), on the device

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.views, self._chosen = {}, choose_layers(pl_module, self.layer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._chosen:
            self._image = evaluation_image(trainer, self.image)
            self._look(trainer, pl_module, trainer.current_epoch - 1)  # a resumed run may start at the end of a stage

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.views:  # nothing was left to train
            self.on_train_start(trainer, pl_module)
        super().on_fit_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(view.stage != stage_of(pl_module) for view in self.views.values()):
            self.draw(trainer)  # the end of the previous stage
        self._look(trainer, pl_module, trainer.current_epoch)
        for name, layer in self._chosen.items() if self.folder is not None else ():
            if layer.planes > 1:
                diversity = kernel_diversity(layer.quantized_weight().detach(), layer.planes)
                # Only one process logs this, so nothing is reduced; without sync_dist Lightning would warn.
                pl_module.log(f"diversity/{name}", diversity, rank_zero_only=True, sync_dist=True)

    @torch.no_grad()
    def _look(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        if not self._chosen or self.folder is None:
            return
        maps: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, layer in self._chosen.items():
                stack.enter_context(layer.register_forward_hook(lambda *seen, name=name: maps.update({name: seen[2]})))
            stack.enter_context(evaluating(pl_module))
            pl_module(self._image.to(pl_module.device))
        for name, layer in self._chosen.items():
            shown = self.channels if layer.planes == 1 else min(self.channels, layer.planes)
            kernels = layer.quantized_weight()[:shown, 0].clone()
            place = stage_of(pl_module), epoch, trainer.fit_loop.total_batch_idx
            self.views[name] = View(*place, kernels, maps[name][0, :shown].clone())

    def draw(self, trainer: Trainer) -> None:
        for layer, view in self.views.items():
            name = "diversity" if self.layer is None else f"diversity_{layer}"
            when = "before training" if view.epoch < 0 else f"{view.stage} stage, after epoch {view.epoch}"
            figure = draw_diversity(self._image[0], view.kernels, view.maps, f"{layer}, {when}")
            # In TensorBoard, all stages share one image tag; each stage has its own file.
            self.show(name, figure, view.batch, file=f"{name}_{view.stage}")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into evaluation mode and disable compiled code within the context.

    Neither ``eval()`` nor ``train()`` is called: they would make 1-bit layers drop a loss that has yet to be read, and
    would put submodules that are kept in evaluation mode into training mode.
    """
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        # Compiled code may skip hooks, and would be recompiled for a batch of one.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part in training:
            part.training = True


def evaluation_image(trainer: Trainer, index: int) -> Tensor:
    """Image ``index`` of the validation set, or of the training set if there is none, as a batch on the device.

    Raises:
        InputError: if ``index`` is not less than the number of images.
    """
    loaders: Any = trainer.val_dataloaders
    if not loaders and trainer.enable_validation and trainer.datamodule is not None:  # type: ignore[attr-defined]
        loaders = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]  # not requested by Lightning yet
    loader: Any = loaders or trainer.train_dataloader
    while isinstance(loader, (list, tuple)):
        loader = loader[0]
    images: Any = loader.dataset
    if index >= len(images):
        raise InputError(f"image must be below {len(images)}, the number of images, but got {index}")
    if hasattr(images, "unaugmented"):
        images = images.unaugmented()
    with isolate_rng():
        one = DataLoader(Subset(images, [index]), collate_fn=loader.collate_fn)
        batch = trainer.strategy.batch_to_device(next(iter(one)))
    image: Tensor = batch[0] if isinstance(batch, (list, tuple)) else batch
    return image


def kernel_diversity(kernels: Tensor, planes: int) -> Tensor:
    r"""Diversity of the kernels made from one latent kernel, from 0 (equal up to a factor) to 1 (orthogonal).

    This is the mean of :math:`1 - |\cos(D_{oj}, D_{oj'})|` over all o and all pairs j < j'. The sign of the cosine is
    ignored because a kernel and its negative detect the same pattern. For binary kernels that differ in a fraction s of
    their signs, it is :math:`1 - |1 - 2s|`.

    Args:
        kernels: (O * planes, in, kh, kw), the planes of each latent kernel adjacent, such as D of PCNN or Q of MCN.
        planes: number of kernels per latent kernel, at least 2.

    Returns:
        A scalar.
    """
    groups = F.normalize(kernels.reshape(-1, planes, kernels[0].numel()), dim=2)
    cosines = (groups @ groups.mT).abs().triu(1)
    return 1 - cosines.sum() / (len(groups) * planes * (planes - 1) / 2)


def draw_diversity(image: Tensor, kernels: Tensor, maps: Tensor, title: str) -> Figure:
    """Draw an image and, for each kernel, a column with the kernel, its feature map and the sign of the map.

    Args:
        image: (C, H, W), normalized to its minimum and maximum.
        kernels: (n, kh, kw).
        maps: (n, H', W').
        title: title of the figure.
    """
    count = len(kernels)
    figure = Figure(figsize=(3.2 + 1.3 * count, 4.8), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    grid = figure.add_gridspec(3, count + 1, width_ratios=[1.5, *[1] * count])
    image = image.float().cpu()
    image = image if len(image) in (1, 3) else image.mean(0, keepdim=True)
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
    axes = figure.add_subplot(grid[:, 0], xticks=[], yticks=[], xlabel=f"{_size(image)} pixels")
    axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray")
    axes.set_title("image", fontsize="medium")
    rows = (
        (f"kernel\n{_size(kernels)}", "weight", kernels),
        (f"feature map\n{_size(maps)} pixels", "activation", maps),
        (f"sign of map\n{_size(maps)} pixels", "sign", sign(maps)),
    )
    for row, (label, unit, pictures) in enumerate(rows):
        pictures = pictures.float().cpu()
        most = float(pictures.abs().max().clamp(min=1e-12))
        panels = [figure.add_subplot(grid[row, column + 1], xticks=[], yticks=[]) for column in range(count)]
        for column, (axes, picture) in enumerate(zip(panels, pictures, strict=True)):
            drawn = axes.imshow(picture.numpy(), cmap="gray", vmin=-most, vmax=most, interpolation="nearest")
            if row == 0:
                axes.set_title(f"channel {column}", fontsize="medium")
                for border in range(1, picture.shape[0]):
                    axes.axhline(border - 0.5, color="0.7", linewidth=0.6)
                for border in range(1, picture.shape[1]):
                    axes.axvline(border - 0.5, color="0.7", linewidth=0.6)
        panels[0].set_ylabel(label)
        ticks = [-most, most] if unit == "sign" else [-most, 0, most]
        figure.colorbar(drawn, ax=panels, label=unit, ticks=ticks, format="%.2g", aspect=12)
    return figure


def _size(pictures: Tensor) -> str:
    height, width = pictures.shape[-2:]
    return f"{width} × {height}"
