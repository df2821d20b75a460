"""The subcommands, as methods of a Trainer: jsonargparse makes their signatures and docstrings into flags and help."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from pcnn_lightning.callbacks import PredictionWriter
from pcnn_lightning.checkpoints import load_checkpoint
from pcnn_lightning.deploy import save_c, save_onnx, save_openvino, save_packed, save_torch
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules import OneBitClassifier, describe
from pcnn_lightning.modules.packed import in_openvino
from pcnn_lightning.reports import NetworkSummary, summarize
from pcnn_lightning.reports.benchmark import Setting, benchmark_inference, benchmark_layer, benchmark_training

Format = Literal["packed", "openvino", "c", "onnx", "torch"]
Runtime = Literal["torch", "openvino"]
EXPORTERS = {
    "packed": (save_packed, [".safetensors"]),
    "openvino": (save_openvino, [".xml", ".bin"]),
    "c": (save_c, [".c", ".h"]),
    "onnx": (save_onnx, [".onnx"]),
    "torch": (save_torch, [".pt2"]),
}
"""The function that writes each format of ``export``, and the suffixes of its files."""


class OneBitTrainer(Trainer):
    """Lightning's Trainer with a method for each subcommand.

    Attributes:
        run_folder: the folder of the run that is trained or tested, if there is one.
    """

    run_folder: Path | None = None

    def test(  # type: ignore[override]
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        runtime: Runtime = "torch",
        verbose: bool = True,
        weights_only: bool | None = None,
    ) -> None:
        """Measure the loss and the accuracy on the test images.

        Args:
            model: The model to test.
            datamodule: The images.
            ckpt_path: The checkpoint to take the weights from: a path, ``best`` or ``last``.
            runtime: What computes the network: ``torch``, or ``openvino``, which takes the frozen network.
            verbose: Whether to print the results.
            weights_only: Whether to read the checkpoint without running code from it.
        """
        if runtime == "openvino":
            model, ckpt_path = self._in_openvino(model, datamodule, ckpt_path), None
        super().test(model, None, ckpt_path, verbose, datamodule, weights_only)

    def predict(  # type: ignore[override]
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        output: str = "predictions.csv",
        runtime: Runtime = "torch",
        weights_only: bool | None = None,
    ) -> None:
        """Predict the label of each image and write a CSV of image, label and probability.

        Args:
            model: The model to predict with.
            datamodule: The images: its test set, or ``ImageFolder``'s ``predict_dir``.
            ckpt_path: The checkpoint to take the weights from: a path, ``best`` or ``last``.
            output: The CSV file to write.
            runtime: What computes the network: ``torch``, or ``openvino``, which takes the frozen network.
            weights_only: Whether to read the checkpoint without running code from it.
        """
        self.callbacks.append(PredictionWriter(output))  # type: ignore[attr-defined]
        if runtime == "openvino":
            model, ckpt_path = self._in_openvino(model, datamodule, ckpt_path), None
        super().predict(
            model, datamodule=datamodule, ckpt_path=ckpt_path, return_predictions=False, weights_only=weights_only
        )

    def _in_openvino(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None
    ) -> LightningModule:
        assert isinstance(model, OneBitClassifier)
        load_weights(model, ckpt_path)
        return in_openvino(model, datamodule)

    def summary(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        format: Literal["table", "csv", "json"] = "table",
    ) -> None:
        """Print parameters, memory and multiply-accumulates of each layer and of the whole network.

        Args:
            model: The model to summarize.
            datamodule: The images, for their size.
            format: ``table``, ``csv`` or ``json``.
        """
        counts = summary_of(model, datamodule)
        print({"table": counts.table, "csv": counts.to_csv, "json": counts.to_json}[format]())

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        output: str | None = None,
        format: Format = "packed",
    ) -> None:
        """Write a trained network as a file for inference.

        Args:
            model: The model to export.
            datamodule: The training data, for the size, mean, standard deviation and classes of its images.
            ckpt_path: The checkpoint to take the weights from: a path, ``best`` or ``last``.
            output: The file to write; by default ``network`` with the suffix of the format.
            format: ``packed``: for this package. ``openvino``: an .xml and a .bin file for x86 processors. ``c``: a .c
                and an .h file for any processor. These three take one bit per sign; ``onnx`` and ``torch``
                (``torch.export``) take one byte.
        """
        assert isinstance(model, OneBitClassifier)
        load_weights(model, ckpt_path)
        save, suffixes = EXPORTERS[format]
        path = Path(f"network{suffixes[0]}" if output is None else output)
        save(model.net, path, describe(model, datamodule))
        for file in (path, *(path.with_suffix(suffix) for suffix in suffixes[1:])):
            print(f"{file}: {file.stat().st_size:,} bytes" if file.is_file() else f"written to {file}")

    def benchmark(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        layer: str | None = None,
        rounds: int = 20,
        warmup: int = 5,
        compile: bool | None = None,
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None,
        channels_last: bool | None = None,
        inference: bool = False,
        batch_sizes: list[int] = [1, 128],  # noqa: B006  (never changed; --help shows it)
        format: Literal["table", "json"] = "table",
    ) -> None:
        """Time training steps of the model and of its full-precision twin in turns.

        Args:
            model: The model to train.
            datamodule: The images to train on.
            layer: Time only this 1-bit layer, beside an ordinary convolution and those of bitorch and brevitas, if
                they are installed.
            rounds: Number of timed rounds.
            warmup: Number of rounds before the timed ones.
            compile: Whether to compile; by default the model's ``compile``.
            precision: Precision of forward passes; by default the Trainer's.
            channels_last: Whether to use channels-last tensors; by default the model's ``channels_last``.
            inference: Time the frozen network from raw images to labels instead, on the CPU: in torch, ONNX Runtime,
                OpenVINO and C, beside the full-precision twin in torch and OpenVINO.
            batch_sizes: Batch sizes of inference.
            format: ``table`` or ``json``.
        """
        assert isinstance(model, OneBitClassifier)
        settings = {"layer": layer, "compile": compile, "precision": precision, "channels_last": channels_last}
        if inference and (given := [name for name, value in settings.items() if value is not None]):
            raise InputError(f"{given[0]} applies to training, but inference is true")
        if not batch_sizes or min(batch_sizes) < 1:
            raise InputError(f"batch_sizes must be one or more numbers of at least 1, but got {batch_sizes}")
        setting = Setting(
            self.strategy.root_device,
            precision or self.precision,
            model.hparams["compile"] if compile is None else compile,
            model.hparams["channels_last"] if channels_last is None else channels_last,
            rounds,
            warmup,
        )
        if inference:
            reports = [benchmark_inference(model, datamodule, size, setting) for size in batch_sizes]
        elif layer is None:
            reports = [benchmark_training(model, datamodule, setting)]
        else:
            batch_size = getattr(datamodule, "batch_size", 128)  # a data module from outside this package may lack it
            reports = [benchmark_layer(model, layer, image_shape_of(datamodule), batch_size, setting)]
        if format == "json":
            print(json.dumps([asdict(report) for report in reports], indent=2, ensure_ascii=False))
        else:
            print("\n\n".join(report.table() for report in reports))

    def sweep(self) -> None:
        """Train and test a run for each combination of settings in a grid."""

    def compare(self) -> None:
        """Draw the curves of several runs into one picture and print their best epochs as a table.

        Runs that differ in their seed only are averaged.
        """


def load_weights(model: OneBitClassifier, ckpt_path: str | None) -> None:
    """Give a model the stage and the weights of a checkpoint, if there is one."""
    if ckpt_path is not None:
        checkpoint = load_checkpoint(ckpt_path)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])


def summary_of(model: LightningModule, datamodule: LightningDataModule) -> NetworkSummary:
    """Summary of a model's network for images of the data's size.

    Raises:
        InputError: if a data module from outside this package does not say it.
    """
    assert isinstance(model, OneBitClassifier)
    return summarize(model.net, image_shape_of(datamodule))


def image_shape_of(datamodule: LightningDataModule) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network is given.

    Raises:
        InputError: if a data module from outside this package does not say it.
    """
    if not hasattr(datamodule, "image_shape"):
        raise InputError(f"{type(datamodule).__name__} has no image_shape (channels, height, width)")
    shape: tuple[int, int, int] = datamodule.image_shape
    return shape


def image_size_of(datamodule: LightningDataModule) -> list[int] | None:
    """[H, W] of the images that a network is given; None if the data module does not say it."""
    return list(datamodule.image_shape[1:]) if hasattr(datamodule, "image_shape") else None
