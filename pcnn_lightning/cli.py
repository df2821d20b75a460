"""The command line: ``python -m pcnn_lightning fit --config configs/digits.yaml``."""

import json
import logging
import os
import signal
import sys
import warnings
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

import pcnn_lightning
from pcnn_lightning import (
    compare,
    data,  # noqa: F401  (makes its classes known to the parser by their short names)
)
from pcnn_lightning.benchmark import Setting, benchmark_inference, benchmark_layer, benchmark_training
from pcnn_lightning.callbacks import PredictionWriter, StageCheckpoint, StageProgressBar
from pcnn_lightning.callbacks.stage_checkpoint import RECORD
from pcnn_lightning.checkpoints import load_checkpoint
from pcnn_lightning.deploy import is_packed, save_onnx, save_packed, save_torch
from pcnn_lightning.errors import DivergedError, InputError
from pcnn_lightning.interruption import Interruption
from pcnn_lightning.modules import OneBitClassifier, PackedClassifier, describe
from pcnn_lightning.summary import NetworkSummary, summarize

LINKED = {"num_classes": 10, "in_channels": 3}
"""What a model is told by its data, with the defaults that it has without them."""

NOISE = (
    r".*isinstance\(treespec, LeafSpec\)",  # lightning 2.6 with newer torch
    r".*does not have many workers",  # images in memory need none
    r".*smaller than the logging interval",  # what is logged here is logged by epoch
    r".*callbacks used to create the checkpoint",  # testing needs no callbacks of training
    r"Using ModelCheckpoint with manual optimization",  # of a trap that needs other attribute names than ours
    r"It is recommended to use .self\.log\('(lr/|stage)",  # the same on all processes
    r"Checkpoint directory .* exists and is not empty",  # files of other runs are not overwritten
)
"""Warnings that a user can do nothing about, or need not."""

EXPORTERS = {"packed": (save_packed, ".safetensors"), "onnx": (save_onnx, ".onnx"), "torch": (save_torch, ".pt2")}
"""What writes each format of ``export``, and how its files' names end."""


class OneBitTrainer(Trainer):
    """Lightning's Trainer, whose methods are the subcommands."""

    def predict(  # type: ignore[override]
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        output: str = "predictions.csv",
    ) -> None:
        """Predict the label of each image and write a CSV of image, label and probability.

        Args:
            model: The model to predict with.
            datamodule: The images: its test set, or ``ImageFolder``'s ``predict_dir``.
            ckpt_path: The checkpoint to take the weights from: a path, ``best`` or ``last``.
            output: The CSV file to write.
        """
        self.callbacks.append(PredictionWriter(output))  # type: ignore[attr-defined]
        super().predict(model, datamodule=datamodule, ckpt_path=ckpt_path, return_predictions=False)

    def summary(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        format: Literal["table", "csv", "json"] = "table",
    ) -> None:
        """Print parameters, memory and multiplications of each layer and of the whole network; nothing is trained.

        Args:
            model: The model to look at.
            datamodule: The images, for their size; none is read but where their size is not known otherwise.
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
        format: Literal["packed", "onnx", "torch"] = "packed",
    ) -> None:
        """Write a trained network as a file for inference.

        Args:
            model: The model to export.
            datamodule: The images that it was trained on, for their size, mean, standard deviation and classes.
            ckpt_path: The checkpoint to take the weights from: a path, ``best`` or ``last``.
            output: The file to write; ``network`` with the format's ending if not given.
            format: ``packed``: one bit a sign, for this package. ``onnx`` and ``torch`` (``torch.export``): a byte a
                sign, for other runtimes.
        """
        assert isinstance(model, OneBitClassifier)
        if ckpt_path is not None:
            checkpoint = load_checkpoint(ckpt_path)
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"])
        save, ending = EXPORTERS[format]
        path = Path(f"network{ending}" if output is None else output)
        save(model.net, path, describe(model, datamodule))
        print(f"{path}: {path.stat().st_size:,} bytes")

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
        batch_sizes: list[int] = [1, 128],  # noqa: B006  (never changed, and shown as it is in --help)
        format: Literal["table", "json"] = "table",
    ) -> None:
        """Time training steps of the model and of its full-precision twin, which take turns.

        Args:
            model: The model to train.
            datamodule: The images to train on.
            layer: Time this 1-bit layer of the network alone, beside an ordinary convolution and, where they are
                installed, those of bitorch and brevitas.
            rounds: How many to time, of each.
            warmup: How many to do before, of each.
            compile: Whether to compile; by default what the model says.
            precision: Of forward passes; by default the Trainer's.
            channels_last: Whether to use channels-last tensors; by default what the model says.
            inference: Time the frozen network from raw images to labels instead, on the CPU: in torch, in ONNX Runtime
                and in the packed runtime, beside the full-precision twin.
            batch_sizes: Of inference.
            format: ``table`` or ``json``.
        """
        assert isinstance(model, OneBitClassifier)
        settings = {"layer": layer, "compile": compile, "precision": precision, "channels_last": channels_last}
        if inference and (given := [name for name, value in settings.items() if value is not None]):
            raise InputError(f"{given[0]} is of training, but inference is true")
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
            batch_size = getattr(datamodule, "batch_size", 128)  # which data of a class of the user's own may lack
            reports = [benchmark_layer(model, layer, image_shape_of(datamodule), batch_size, setting)]
        if format == "json":
            print(json.dumps([asdict(report) for report in reports], indent=2, ensure_ascii=False))
        else:
            print("\n\n".join(report.table() for report in reports))


class Parser(LightningArgumentParser):
    """A parser that answers a mistake with the mistake alone; the usage, of 150 lines, is what --help is for."""

    def print_usage(self, file: Any = None) -> None:
        if file is not sys.stderr:
            super().print_usage(file)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of the logs; without one there is no place that would be the run's own."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class OneBitCLI(LightningCLI):
    """LightningCLI with the model's shape linked to the data, and checkpoints read as the first layer of the config."""

    _step_before: int | None = None  # of the checkpoint that a run goes on from, if the user names one

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        given = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "summary": given, "benchmark": given, "export": given}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given: Any = sys.argv[1:] if args is None else args
        path = _checkpoint_argument(given) if isinstance(given, list) else None
        try:
            if path is None:
                super().parse_arguments(parser, args)
            else:
                place = next((at for at, word in enumerate(given) if word in self.subcommands()), 0) + 1
                if is_packed(path) and given[place - 1] != "fit":
                    # A packed file knows its network by itself, whatever model the user's files and flags name.
                    layered = [*given, "--config", _packed_config(path)]
                else:
                    # A checkpoint's hyperparameters come below the user's files and flags: what the user says, wins.
                    layered = [*given[:place], "--config", _model_config(path), *given[place:]]
                self.config = parser.parse_args(layered)
        except UnicodeDecodeError as error:
            files = [word for word in given if isinstance(word, str) and word.endswith((".yaml", ".yml", ".json"))]
            raise InputError(f"a configuration file is not UTF-8 text ({error}): {', '.join(files)}") from error

    def _parse_ckpt_path(self) -> None:
        """Done by :meth:`parse_arguments`; Lightning's own would overrule the user."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(f"seed_everything: {error}") from error

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.config["subcommand"]]["trainer"]
        if not isinstance(trainer, Namespace):  # the parser lets trainer: true pass
            raise InputError(f"trainer must be a mapping of the Trainer's arguments, but got {trainer!r}")
        if trainer["gradient_clip_val"] is not None:
            raise InputError("trainer.gradient_clip_val does not reach this loop: set model.gradient_clip")
        if trainer["accumulate_grad_batches"] != 1:
            raise InputError("trainer.accumulate_grad_batches does not reach this loop: set model.accumulate")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            cause: BaseException = error
            while (inner := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)) is not None:
                cause = inner  # what a class said, not the parser's account of it
            raise InputError(str(cause)) from error

    def after_instantiate_classes(self) -> None:
        if type(self.model) is OneBitClassifier:
            raise InputError("model.class_path is missing: it must be PCNN or MCN")
        given = self.config[self.config["subcommand"]]["model"]["init_args"]
        for name in LINKED:
            if not hasattr(self.datamodule, name):
                raise InputError(f"{type(self.datamodule).__name__} has no {name}, which a model has to be told")
            of_data = getattr(self.datamodule, name)
            if given.get(name, of_data) not in (of_data, LINKED[name]):
                raise InputError(f"model.{name} is {given[name]}, but the data have {of_data}: leave it to the data")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        wanted = self.config_init[self.config_init["subcommand"]]["trainer"]
        given = wanted["callbacks"] if isinstance(wanted["callbacks"], list) else [wanted["callbacks"]]
        if wanted["enable_progress_bar"] is not False and not any(isinstance(one, ProgressBar) for one in given):
            self.trainer_defaults["callbacks"] = [StageProgressBar()]
        # In place of Lightning's summary, which knows no bits, there is before_fit.
        return super().instantiate_trainer(enable_model_summary=False, **kwargs)

    @rank_zero_only
    def before_fit(self) -> None:
        wanted = self.config["fit"]["trainer"]["enable_model_summary"] is not False
        if wanted and hasattr(self.datamodule, "image_shape"):
            print(summary_of(self.model, self.datamodule).table(), end="\n\n")

    def after_fit(self) -> None:
        path = self.trainer.ckpt_path
        went_on = self.trainer.global_step != self._step_before or "val/accuracy" in self.trainer.callback_metrics
        if self._step_before is not None and not went_on:
            raise InputError(
                f"{path} has trained for {self.trainer.current_epoch} epochs already: "
                "set trainer.max_epochs (or max_steps) higher to go on"
            )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("summary", "benchmark"):
            return kwargs
        path = find_checkpoint(kwargs.get("ckpt_path"), self.trainer)
        if path is None and subcommand != "fit":
            raise InputError(f"{subcommand} needs trained weights: --ckpt_path with a path, best or last")
        if isinstance(self.model, PackedClassifier):
            return {**kwargs, "ckpt_path": None}  # its weights are in it already
        if path is not None:
            self._step_before = load_checkpoint(path)["global_step"]
        return {**kwargs, "ckpt_path": path}


def summary_of(model: LightningModule, datamodule: LightningDataModule) -> NetworkSummary:
    """What a model's network costs on images of the data's size.

    Raises:
        InputError: if the data, of a class of the user's own, do not say it.
    """
    assert isinstance(model, OneBitClassifier)
    return summarize(model.net, image_shape_of(datamodule))


def image_shape_of(datamodule: LightningDataModule) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network is given.

    Raises:
        InputError: if the data, of a class of the user's own, do not say it.
    """
    if not hasattr(datamodule, "image_shape"):
        raise InputError(f"{type(datamodule).__name__} has no image_shape (channels, height, width)")
    shape: tuple[int, int, int] = datamodule.image_shape
    return shape


def find_checkpoint(path: str | None, trainer: Trainer) -> str | None:
    """The file behind ``--ckpt_path``, which may be ``best`` or ``last`` of the folder that the config names.

    Raises:
        InputError: if there is none, rather than train from the start without a word.
    """
    if path not in ("best", "last"):
        return path
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folders = [Path(callback.dirpath) for callback in callbacks if callback.dirpath]
    if path == "last":
        found = [file for folder in folders for file in folder.glob("last*.ckpt")]
        found.sort(key=lambda file: file.stat().st_mtime)
    else:
        best = [callback.best_checkpoint() for callback in callbacks if isinstance(callback, StageCheckpoint)]
        found = [Path(file) for file in best if file is not None]
    if not found:
        where = ", ".join(map(str, folders)) or "a folder: set dirpath of StageCheckpoint"
        raise InputError(f"--ckpt_path {path}: there is no such checkpoint in {where}")
    if not found[-1].is_file():  # best, by a record that has outlived it
        folder, name = found[-1].parent, found[-1].name
        raise InputError(f"--ckpt_path {path}: {folder / RECORD} names {name}, which is gone")
    return str(found[-1])


def main(args: ArgsType = None) -> OneBitCLI | None:
    """Run the command line; what the user can mend ends in one line and exit status 2, a diverged run in 1."""
    given: Any = sys.argv[1:] if args is None else args
    strict = {"allow_abbrev": False}
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    # Lightning advertises other products in the log of every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
    with Interruption() as interruption:
        try:
            if isinstance(given, list) and given[:1] == ["compare"]:
                compare.main(given[1:])  # it needs no model and no data
                return None
            return OneBitCLI(
                OneBitClassifier,
                LightningDataModule,
                trainer_class=OneBitTrainer,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                parser_kwargs={
                    **strict,
                    "prog": "pcnn_lightning",
                    "version": pcnn_lightning.__version__,
                    "description": "Train 1-bit convolutional networks. "
                    "Finished runs are laid over each other by: pcnn_lightning compare RUN RUN ...",
                    **dict.fromkeys(OneBitCLI.subcommands(), strict),
                },
                args=args,
            )
        except (InputError, DivergedError, MisconfigurationException) as error:
            if "PCNN_LIGHTNING_TRACEBACK" in os.environ:
                raise
            # A loader's worker sends its traceback along; the message is what follows the error's name.
            message = str(error).rstrip().rsplit("InputError: ", 1)[-1]
            _fail(message, 1 if isinstance(error, DivergedError) else 2)
        except OSError as error:
            if "PCNN_LIGHTNING_TRACEBACK" in os.environ or error.strerror is None:
                raise
            _fail(f"{error.strerror}: {error.filename or 'while writing a file of the run'}", 2)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)  # of what trains nothing
        except SIGTERMException:
            sys.exit(interruption.status)  # Lightning's own would be that of success


def _fail(message: str, status: int) -> NoReturn:
    print(f"pcnn_lightning: error: {message}", file=sys.stderr)
    sys.exit(status)


def _model_config(path: str) -> str:
    """The model that a checkpoint holds, as a configuration in JSON."""
    checkpoint = load_checkpoint(path)
    hparams = {
        name: value
        for name, value in checkpoint["hyper_parameters"].items()
        if name not in LINKED and not name.startswith("_")
    }
    class_path = f"pcnn_lightning.{checkpoint['one_bit']['family']}"
    return json.dumps({"model": {"class_path": class_path, "init_args": hparams}})


def _packed_config(path: str) -> str:
    """A packed network, as a configuration in JSON."""
    return json.dumps({"model": {"class_path": "pcnn_lightning.modules.PackedClassifier", "init_args": {"path": path}}})


def _checkpoint_argument(args: list[str]) -> str | None:
    """The file given as ``--ckpt_path FILE`` or ``--ckpt_path=FILE``, if any."""
    for argument, following in reversed(list(pairwise([*args, ""]))):  # the last one is what the parser takes
        if argument == "--ckpt_path" or argument.startswith("--ckpt_path="):
            path = argument.partition("=")[2] or following
            return None if path in ("best", "last", "null", "") else path
    return None
