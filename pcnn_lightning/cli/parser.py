"""LightningCLI with the project's subcommands, defaults of a run, and readable mistakes."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from pcnn_lightning import data  # noqa: F401  (lets the parser resolve its classes by their short names)
from pcnn_lightning.checkpoints import folder_of_run, load_checkpoint
from pcnn_lightning.cli.checkpoint_argument import (
    LINKED,
    checkpoint_argument,
    image_arguments,
    model_config,
    packed_config,
)
from pcnn_lightning.cli.completion import add_completion
from pcnn_lightning.cli.defaults import add_run_arguments, trainer_arguments, use_folder
from pcnn_lightning.cli.interruption import (
    BetweenBatches,
    BetweenBatchesAndCheckpoints,
    ended_by_time,
    resume_command,
)
from pcnn_lightning.cli.names import PROGRAM, list_classes, packaged_sweeps, readable, with_packaged_configs
from pcnn_lightning.cli.run_folder import (
    begin_run,
    continue_logs,
    find_checkpoint,
    folders_of,
    requeued_checkpoint,
)
from pcnn_lightning.cli.subcommands import OneBitTrainer, image_size_of, summary_of
from pcnn_lightning.cli.sweep.arguments import add_sweep_arguments, split_arguments
from pcnn_lightning.data.memory import amount, available_memory
from pcnn_lightning.devices import computes_bf16, keep_freed_memory
from pcnn_lightning.errors import DivergedError, InputError
from pcnn_lightning.families import FAMILIES
from pcnn_lightning.files import SUMMARY, is_packed, write_whole
from pcnn_lightning.modules import OneBitClassifier, PackedClassifier
from pcnn_lightning.reports import NetworkSummary, compare
from pcnn_lightning.tables import filled

WITHOUT_MODEL = ("compare", "sweep")
"""Subcommands that have no model, data and trainer."""


class Parser(LightningArgumentParser):
    """A parser that reports a mistake without 150 lines of usage, which are what --help is for."""

    def __init__(self, *args: Any, prog: str = PROGRAM, **kwargs: Any) -> None:
        super().__init__(*args, prog=prog, **kwargs)  # else the help of a class would name the file that was run

    def print_usage(self, file: Any = None) -> None:
        if file is not sys.stderr:
            super().print_usage(file)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(readable(message), ex)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of a run that trains."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or getattr(trainer, "run_folder", None) is None:
            return
        folder = folder_of_run(trainer)  # asked for by all processes, of which the first one tells the others
        if trainer.is_global_zero:
            write_whole(folder / self.config_filename, self.parser.dump(self.config, skip_none=False).encode())


class OneBitCLI(LightningCLI):
    """The command line. A checkpoint's hyperparameters are the lowest layer of the configuration."""

    _ckpt_path: str | None = None  # the file behind --ckpt_path
    _args: Sequence[str] = ()  # as they were given
    fit_arguments: Sequence[str] = ()  # of all runs of a sweep
    _step_before: int | None = None  # of the checkpoint that a run goes on from

    # Parsing.

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        given = {"model", "datamodule"}
        own = {"summary": given, "benchmark": given, "export": given, **{name: set() for name in WITHOUT_MODEL}}
        return {name: skipped | {"weights_only"} for name, skipped in {**LightningCLI.subcommands(), **own}.items()}

    def setup_parser(self, *args: Any) -> None:
        super().setup_parser(*args)
        add_completion(self.parser, self._subcommand_parsers.values())

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand not in WITHOUT_MODEL:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser = self.init_parser(**kwargs)
        if subcommand == "sweep":
            add_sweep_arguments(parser)
            return parser
        where = "A folder of logs, one above the newest run's, or one with sweep.yaml, for all runs of the sweep."
        parser.add_argument("runs", nargs="+", metavar="RUN", help=where)
        parser.add_argument("--output", default="comparison.png", help="The picture to write.")
        parser.add_argument("--metric", default="accuracy", help="The metric to compare.")
        over = "Average runs that differ in this setting only; null for none."
        parser.add_argument("--over", type=str | None, default="seed_everything", help=over)
        form = "How to print the results; csv has exact numbers."
        parser.add_argument("--format", type=Literal["table", "csv", "markdown"], default="table", help=form)
        beside = "YAML file of published accuracies by the label of a row, for a column of their own."
        parser.add_argument("--published", type=str | None, default=None, help=beside)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.link_arguments("data", "model.init_args.image_size", image_size_of, apply_on="instantiate")
        add_run_arguments(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given: Any = sys.argv[1:] if args is None else args
        if not isinstance(given, list):
            super().parse_arguments(parser, args)
            return
        self._args = given
        list_classes(given)
        if given[:1] == ["sweep"]:
            own, self.fit_arguments = split_arguments(given[1:])
            given = ["sweep", *own]
        given = with_packaged_configs(given)
        path = checkpoint_argument(given)
        try:
            if path is None:
                self.config = parser.parse_args(given)
                return
            place = next((at for at, word in enumerate(given) if word in self.subcommands()), 0) + 1
            if is_packed(path) and given[place - 1] != "fit":
                # A packed file describes its network, whatever model the user's files and flags name.
                layered = [*given, "--config", packed_config(path)]
            else:
                # Below the user's files and flags, which win.
                layered = [*given[:place], "--config", model_config(path), *given[place:]]
            self.config = parser.parse_args(layered)
            self._take_images_from(path)
        except UnicodeDecodeError as error:
            files = [word for word in given if isinstance(word, str) and word.endswith((".yaml", ".yml", ".json"))]
            raise InputError(f"a configuration file is not UTF-8 text ({error}): {', '.join(files)}") from error

    def _take_images_from(self, path: str) -> None:
        """Give the data those arguments that the user does not name and the file with the network tells."""
        subcommand = self.config["subcommand"]
        given = self.config[subcommand]["data"]["init_args"]
        if subcommand != "fit":
            for name, value in image_arguments(path).items():
                if name in given and given[name] is None:
                    given[name] = value

    def _parse_ckpt_path(self) -> None:
        """Done by :meth:`parse_arguments`; Lightning's own would overrule the user."""

    # From a configuration to model, data and trainer.

    def _set_seed(self) -> None:
        if self.subcommand in WITHOUT_MODEL:
            return
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(f"seed_everything: {error}") from error

    def before_instantiate_classes(self) -> None:
        if self.subcommand in WITHOUT_MODEL:
            return
        trainer = self.config[self.config["subcommand"]]["trainer"]
        if not isinstance(trainer, Namespace):  # the parser accepts trainer: true
            raise InputError(f"trainer must be a mapping of the Trainer's arguments, but got {trainer!r}")
        if trainer["gradient_clip_val"] is not None:
            raise InputError("trainer.gradient_clip_val has no effect in this loop: set model.gradient_clip")
        if trainer["accumulate_grad_batches"] != 1:
            raise InputError("trainer.accumulate_grad_batches has no effect in this loop: set model.accumulate")

    def instantiate_classes(self) -> None:
        if self.subcommand in WITHOUT_MODEL:
            return
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            cause: BaseException = error
            # The message of the class itself, not of the parser; an InputError says it all.
            while not isinstance(cause, InputError) and (inner := _inner(cause)) is not None:
                cause = inner
            raise InputError(str(cause)) from error

    def after_instantiate_classes(self) -> None:
        if self.subcommand in WITHOUT_MODEL:
            return
        if type(self.model) is OneBitClassifier:
            raise InputError(f"model.class_path is missing: it must be one of {', '.join(FAMILIES)}")
        given = self.config[self.config["subcommand"]]["model"]["init_args"]
        for name in LINKED:
            if not hasattr(self.datamodule, name):
                raise InputError(f"{type(self.datamodule).__name__} has no {name}, which the model needs")
            of_data = getattr(self.datamodule, name)
            if given.get(name, of_data) not in (of_data, LINKED[name]):
                raise InputError(f"model.{name} is {given[name]}, but the data have {of_data}: leave it to the data")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run = self.config_init[self.config_init["subcommand"]]
        arguments = trainer_arguments(run)
        if not arguments["barebones"]:
            last = BetweenBatches if arguments["enable_checkpointing"] is False else BetweenBatchesAndCheckpoints
            arguments["callbacks"].append(last())
        folder = self._find_run(run, arguments)
        try:
            trainer: Trainer = self._instantiate_trainer({**arguments, **kwargs}, [])
        except Exception:
            if folder is not None:
                with suppress(OSError):  # it is that of an earlier run
                    folder.rmdir()
            raise
        if isinstance(trainer, OneBitTrainer) and self.subcommand in ("fit", "test"):
            trainer.run_folder = folder
        return trainer

    def _find_run(self, run: Namespace, arguments: dict[str, Any]) -> Path | None:
        """Find the checkpoint to use and the folder of the run, and let the logs continue those of its run."""
        run_dir, fitting, path = Path(run["run_dir"]).expanduser(), self.subcommand == "fit", run.get("ckpt_path")
        if path in ("best", "last"):
            path = find_checkpoint(path, arguments["callbacks"] or [], run_dir, to_train=fitting)
        elif path is None and fitting and SLURMEnvironment.detect():
            path = requeued_checkpoint(Path(arguments["default_root_dir"] or run_dir))
        self._ckpt_path = None if path is None else str(path)
        folders: list[Path] = []
        first_batch = None
        if path is not None and not is_packed(path):
            checkpoint = load_checkpoint(str(path))
            folders = folders_of(Path(path), checkpoint)
            if fitting:
                batches = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
                first_batch = batches.get("total", {}).get("ready")
                self._step_before = checkpoint.get("global_step")
        if arguments["barebones"]:
            return None
        folder = next(iter(folders), None)
        if fitting and not arguments["fast_dev_run"]:
            own = run_dir.resolve()
            folder = next((one for one in folders if own in (one, one.parent)), None) or begin_run(run_dir)
        if self.subcommand == "predict" and run["trainer"]["logger"] is None:
            arguments["logger"] = False
        use_folder(arguments, folder)
        continue_logs(arguments["logger"] or [], [folder, *folders] if folder else [], first_batch)
        return folder

    # Running a subcommand.

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "compare":
            asked = self.config["compare"]
            names = ("runs", "output", "metric", "over", "format")
            published = packaged_sweeps().get(asked["published"], asked["published"])
            print(compare(**{name: asked[name] for name in names}, published=published))
            return
        if subcommand == "sweep":
            return  # follows when this is complete
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            # Printed after the message of the error.
            change = ", after such a change" if isinstance(error, DivergedError) else ""
            error.how_to_go_on = self._how_to_go_on(change)  # type: ignore[attr-defined]
            raise

    def _how_to_go_on(self, change: str) -> str | None:
        command = resume_command(self.trainer, self._args) if self.subcommand == "fit" else None
        return command and f"To go on{change}: {command}"

    @rank_zero_only
    def before_fit(self) -> None:
        wanted = self.config["fit"]["trainer"]["enable_model_summary"] is not False
        if wanted and hasattr(self.datamodule, "image_shape"):
            counts = summary_of(self.model, self.datamodule)
            print(counts.table(), end="\n\n")
            if self.model.conversion is not None:
                print(filled(self.model.conversion.total()), end="\n\n")
            self._write_summary(counts)
            self._warn_of_memory(counts)
        if str(self.trainer.precision).startswith("bf16") and not computes_bf16(self.trainer.strategy.root_device):
            print(
                "warning: this CPU has neither AVX-512 BF16 nor AMX, and converts bfloat16 in software: "
                "trainer.precision 32-true is likely to be faster here",
                file=sys.stderr,
            )

    def _write_summary(self, counts: NetworkSummary) -> None:
        """Write the summary of the network in its present stage to the folder of the run."""
        if isinstance(self.trainer, OneBitTrainer) and self.trainer.run_folder is not None:
            write_whole(self.trainer.run_folder / SUMMARY, counts.to_csv().encode())

    def _warn_of_memory(self, counts: NetworkSummary) -> None:
        """Say that the kernel is likely to kill a run on CPUs; a GPU raises an error of its own."""
        batch_size, free = getattr(self.datamodule, "batch_size", 0), available_memory()
        images = batch_size * self.trainer.num_devices
        needed = images * counts.activations * (2 if "16" in str(self.trainer.precision) else 4)
        if self.trainer.strategy.root_device.type == "cpu" and free is not None and needed > free:
            print(
                f"warning: a training step on {images} images of {counts.image_shape[1]}×{counts.image_shape[2]} takes "
                f"some {amount(needed)} of memory, but {amount(free)} are available, and the system may kill the run: "
                "lower --data.batch_size or --data.image_size",
                file=sys.stderr,
            )

    @rank_zero_only
    def after_fit(self) -> None:
        if hasattr(self.datamodule, "image_shape"):
            # The network may have gone from ternary to binary.
            self._write_summary(summary_of(self.model, self.datamodule))
        path = self.trainer.ckpt_path
        went_on = self.trainer.global_step != self._step_before or "val/accuracy" in self.trainer.callback_metrics
        if self._step_before is not None and not went_on:
            print(
                f"{path} has trained for {self.trainer.current_epoch} epochs already: nothing was left to train. "
                "To go on, set trainer.max_epochs (or max_steps, max_time) higher.",
                file=sys.stderr,
            )
        elif ended_by_time(self.trainer) and (advice := self._how_to_go_on(", with a longer trainer.max_time")):
            print(advice, file=sys.stderr)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("summary", "benchmark"):
            return kwargs
        path = self._ckpt_path
        if path is None and subcommand != "fit":
            raise InputError(f"{subcommand} needs trained weights: --ckpt_path with a path, best or last")
        if isinstance(self.model, PackedClassifier):
            return {**kwargs, "ckpt_path": None}  # it has its weights already
        if path is not None and is_packed(path):
            load_checkpoint(path)  # says what can be done with it
        safely = {} if subcommand == "export" else {"weights_only": True}
        return {**kwargs, "ckpt_path": path, **safely}


def _inner(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)
