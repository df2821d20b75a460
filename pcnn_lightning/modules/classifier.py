"""The training loop of every family of 1-bit classifiers."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from pcnn_lightning.backbones import BLOCK_OPTIONS, Network, build_backbone
from pcnn_lightning.checkpoints import check_same_tensors, load_checkpoint, use_atomic_io
from pcnn_lightning.checks import check_choice, check_given, check_integer, check_number, check_positive
from pcnn_lightning.conversion import ConversionReport
from pcnn_lightning.errors import InputError, compile_failed
from pcnn_lightning.layers import QuantizedConv2d, SignActivation, one_bit_layers
from pcnn_lightning.losses import CenterLoss, CrossEntropy, Distillation, LossTerm, Outputs, QuantizationLoss
from pcnn_lightning.modules.accumulation import check_accumulation, synced_only_if, update_of
from pcnn_lightning.modules.conversion import build_external, check_external, is_external
from pcnn_lightning.modules.divergence import DivergenceWatch
from pcnn_lightning.modules.labels import check_labels, class_counts, initial_class_weights
from pcnn_lightning.modules.metrics import EpochMeans, SampleMean, accuracies
from pcnn_lightning.modules.optimization import (
    KERNELS,
    OTHERS,
    GroupSettings,
    begin_optimization,
    group_settings,
    make_optimizer,
    run_epochs,
    set_rates,
)
from pcnn_lightning.modules.refusals import check_trainer
from pcnn_lightning.modules.run_state import (
    Pending,
    check_run,
    leave_finished_epoch,
    pending_update,
    random_state,
    restore_random_state,
    restore_update,
    restored_stage,
    save_run,
)
from pcnn_lightning.modules.teacher import Teacher, load_teacher
from pcnn_lightning.stages import ENTERING, STAGES, Schedule, Stage, is_stage_name


class OneBitClassifier(LightningModule):
    """Trains a network with 1-bit layers under manual optimization.

    All arguments are primitives, so that a checkpoint loads without further information. A subclass names its
    ``family`` and calls :meth:`build_network` with its layers; the layers answer everything else.

    Args:
        num_classes: number of classes.
        in_channels: number of channels of the images.
        image_size: height and width of the images, with which a network to convert is traced; None takes 224×224, or
            32×32 if ``small_images``.
        backbone: ``wrn7``, ``wrn10``, ``wrn22``, ``wrn40``, ``resnet18``, ``resnet34``, ``resnet18_cifar``,
            ``resnet34_cifar``, ``vgg_small``, ``mcn8``, ``mcn20`` or ``mcn_small``; or a network to convert,
            such as ``torchvision/resnet18`` or ``timm/resnet18d``.
        network: a function of your own, such as ``my_package.build``, that makes the network to convert from
            ``num_classes`` and ``in_channels``; ``backbone`` is then ignored.
        pretrained: whether the network of torchvision or timm has its pretrained weights; or a file with them.
        small_images: whether a ResNet of torchvision or timm begins without striding and pooling, as for CIFAR.
        convert: arguments of the conversion: ``include``, ``exclude``, ``overrides``, ``pointwise``, and
            ``activations``: ``real``, ``sign``, or ``threshold``, a learned threshold in front of the sign.
        widths: feature maps of the stem and of each stage; None takes the backbone's own.
        dropout: dropout rate, for a backbone that has dropout.
        activation_threshold: whether the blocks of wide ResNets, ResNets and VGG-small learn a threshold for each
            channel in front of its sign, as in ReActNet; without effect in full precision.
        two_slopes: whether both slopes of the PReLUs of these blocks are learned, as in AdaBin.
        full_precision: train the full-precision twin: the same network with ordinary convolutions and no sign.
        eta1: η₁, learning rate of the kernels and all other ordinary parameters.
        schedule: how η₁ changes over a stage: ``constant``, ``multistep``, ``cosine`` or ``exponential``.
        milestones: shares of a stage at which ``multistep`` multiplies by ``decay``.
        decay: factor of ``multistep`` (at each milestone) and ``exponential`` (after each epoch).
        warmup_epochs: epochs of linear warm-up at the start of each stage.
        optimizer: ``sgd`` or ``adam``.
        momentum: momentum of ``sgd``.
        nesterov: whether ``sgd`` uses Nesterov momentum.
        weight_decay: weight decay of everything that is learned at η₁.
        kernel_weight_decay: weight decay of the latent kernels of 1-bit layers; None: ``weight_decay``.
        accumulate: batches per update; the batches left at the end of an epoch make a smaller update.
        gradient_clip: largest norm of an update's gradient, over all parameters; None does not clip.
        label_smoothing: label smoothing of the cross-entropy in training.
        class_weights: weights of the classes in the cross-entropy of training, a number for each; or ``balanced``,
            n / (classes · n_c) for n_c of n training images. The mean of a batch is weighted, and updates average over
            the batches of all processes. None weighs all images alike.
        center_loss_weight: γ, weight of the center loss, a sum over the samples of an update; 0 turns it off.
        center_loss_alpha: α, the share of the way that a center moves in an update.
        center_loss_start: the first epoch with center loss, or the first stage, such as ``binary`` or, in a plan of
            stages, ``binary_2``.
        teacher: a trained network to learn from: a checkpoint of any family; a network of torchvision or timm with its
            pretrained weights, such as ``torchvision/resnet18``; or a function of your own, such as
            ``my_package.build``, that makes it from ``num_classes`` and ``in_channels``.
        distill_loss_weight: weight of the cross-entropy with the teacher's predictions, in training only.
        distill_loss_start: the first epoch or stage with it, as of the center loss.
        task_loss_weight: weight of the cross-entropy with the labels beside a teacher, in training only.
        temperature: T, by which the logits of both are divided; the loss is multiplied by T².
        init_from: a checkpoint whose network a new run starts from; its stage is ignored.
        compile: whether to compile the backbone with ``torch.compile`` for training, once per stage. On a CPU this
            takes a C++ compiler.
        channels_last: whether the backbone works on channels-last tensors.

    Attributes:
        net: the network.
        conversion: what became 1-bit in a network from outside this package; None for others.
        terms: the terms of the loss, by their names in the logs.
        plan: the stages of the run, as a callback has planned them.
        stage: the current stage, a key of ``pcnn_lightning.stages.STAGES``.
        stage_name: what logs and files call it.
        entered: number of 1-bit layers that are in the current stage.
        planes: J or K, channels per feature map.
        block: options of the blocks that are on, of ``pcnn_lightning.backbones.BLOCK_OPTIONS``.

    Raises:
        ValueError: names the argument that is wrong, its value and what is allowed.
    """

    family: str
    """Name in ``pcnn_lightning.families.FAMILIES``; a subclass of a family keeps it."""

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: list[int] | None = None,
        backbone: str = "wrn22",
        network: str | None = None,
        pretrained: bool | str = False,
        small_images: bool = False,
        convert: dict[str, Any] | None = None,
        widths: list[int] | None = None,
        dropout: float = 0.0,
        activation_threshold: bool = False,
        two_slopes: bool = False,
        full_precision: bool = False,
        eta1: float = 0.1,
        schedule: Schedule = "multistep",
        milestones: list[float] = [0.3, 0.6, 0.8],  # noqa: B006  (never changed; --help shows it)
        decay: float = 0.2,
        warmup_epochs: float = 0.0,
        optimizer: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 3e-4,
        kernel_weight_decay: float | None = None,
        accumulate: int = 1,
        gradient_clip: float | None = None,
        label_smoothing: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        center_loss_weight: float = 0.0,
        center_loss_alpha: float = 0.5,
        center_loss_start: int | str = 0,
        teacher: str | None = None,
        distill_loss_weight: float = 1.0,
        distill_loss_start: int | str = 0,
        task_loss_weight: float = 1.0,
        temperature: float = 1.0,
        init_from: str | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pretrained"])  # a checkpoint has the weights that came of them
        self._pretrained = pretrained
        self.automatic_optimization = False
        for kind in type(self).__mro__:
            if issubclass(kind, OneBitClassifier) and "__init__" in vars(kind):
                check_given(kind.__init__, {**self.hparams, "pretrained": pretrained})
        check_integer("num_classes", num_classes, 2)
        check_integer("accumulate", accumulate, 1)
        if gradient_clip is not None:
            check_positive("gradient_clip", gradient_clip)
        check_choice("optimizer", optimizer, ("sgd", "adam"))
        check_number("momentum", momentum, 0, below=1)
        check_start("center_loss_start", center_loss_start)
        check_start("distill_loss_start", distill_loss_start)
        check_number("distill_loss_weight", distill_loss_weight, 0)
        check_number("task_loss_weight", task_loss_weight, 0)
        distillation = Distillation(distill_loss_weight, temperature, distill_loss_start)
        if teacher is not None and distill_loss_weight == task_loss_weight == 0:
            raise ValueError("distill_loss_weight or task_loss_weight must be positive, but both are 0")
        self.groups = self.group_settings(self.hparams)
        self._terms, self.train_means = nn.ModuleDict(), EpochMeans(num_classes)
        class_numbers = initial_class_weights(class_weights, num_classes)
        task_weight = 1.0 if teacher is None else task_loss_weight
        self.add_term("cross_entropy", CrossEntropy(label_smoothing, class_numbers, task_weight))
        if teacher is not None and distill_loss_weight > 0:
            self.add_term("distill_loss", distillation)
        self._teacher: Teacher | None = None  # loaded when training starts
        self.val_accuracies, self.test_accuracies = accuracies(num_classes), accuracies(num_classes)
        self.next_plan: dict[str, Stage] = {}
        self.plan: dict[str, Stage] = {}
        self._stage: Stage | None = None  # of a network in full precision
        self._name, self.entered = "", 0
        self.stage_start = 0
        self.stage_end: int | None = None
        self.divergence = DivergenceWatch()
        self._init_from = init_from  # None as soon as the network holds anything else
        self._memory_format = torch.contiguous_format
        self._within_update = False  # gradients of some of an update's batches wait for the others
        self._pending: Pending | None = None  # of a checkpoint just loaded
        self._random_state: list[dict[str, Any]] | None = None  # likewise

    def build_network(
        self,
        convolution: Callable[..., nn.Module],
        activation: Callable[..., nn.Module] = SignActivation,
        planes: int = 1,
    ) -> None:
        """Build the backbone and the loss terms that go with it.

        Args:
            convolution: makes a 1-bit layer, as the backbones ask for it.
            activation: makes the activation in front of a 1-bit layer; ``nn.Identity`` for real activations.
            planes: channels per feature map.
        """
        hparams = self.hparams
        self.planes = planes
        if hparams["activation_threshold"] and activation is nn.Identity:
            raise ValueError("activation_threshold must be false, since this model has real activations, but got True")
        self.block = {name: True for name in BLOCK_OPTIONS if hparams[name]}
        if hparams["full_precision"]:
            self.block.pop("activation_threshold", None)  # there is no sign
        about_network = {**hparams, "pretrained": self._pretrained}
        check_external(about_network)
        self.net: Network
        self.conversion: ConversionReport | None = None
        if is_external(hparams):
            self.net, self.conversion = build_external(about_network, convolution, activation)
        else:
            self.net = build_backbone(
                hparams["backbone"],
                hparams["num_classes"],
                hparams["in_channels"],
                plain_convolution if hparams["full_precision"] else convolution,
                nn.Identity if hparams["full_precision"] else activation,
                widths=hparams["widths"],
                planes=planes,
                dropout=hparams["dropout"],
                **self.block,
            )
        layers = list(self.one_bit_layers.values())
        for layer in layers:
            if (layer.quantization_loss() is None) != (layer.loss_name is None):
                raise ValueError(f"{type(layer).__name__} must have a quantization loss and a loss_name, or neither")
        if names := dict.fromkeys(layer.loss_name for layer in layers if layer.loss_name is not None):
            name = next(iter(names))
            self.add_term(name, QuantizationLoss(name.replace("_", " ")))
        classifier = self.net.classifier
        options = [hparams[f"center_loss_{name}"] for name in ("weight", "alpha", "start")]
        try:
            center_loss = CenterLoss(classifier.out_features, classifier.in_features, *options)
        except ValueError as error:
            raise ValueError(f"center_loss_{error}") from None  # the name that its argument has here
        if center_loss.weight > 0:
            self.add_term("center_loss", center_loss)
        if layers:
            self.set_stage(layers[0].stage)

    def add_term(self, name: str, term: LossTerm) -> None:
        """Add a term to the loss, which is logged as ``train/<name>`` and ``val/<name>``.

        Raises:
            ValueError: if the name is taken.
        """
        if name in self.train_means:
            raise ValueError(f"name must be another than {', '.join(self.train_means)}, but got {name!r}")
        self._terms[name], self.train_means[name] = term, SampleMean()

    def twin(self) -> "OneBitClassifier":
        """An untrained full-precision twin: the same widths, blocks and hyperparameters, with ordinary convolutions."""
        hparams = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        return type(self)(**{**hparams, "full_precision": True, "teacher": None})

    @property
    def terms(self) -> dict[str, LossTerm]:
        """The terms of the loss, by their names in the logs."""
        return cast(dict[str, LossTerm], dict(self._terms.items()))

    @property
    def one_bit_layers(self) -> dict[str, QuantizedConv2d]:
        """The 1-bit convolutions from input to output, by their names in :attr:`net`."""
        return one_bit_layers(self.net)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, in_channels, H, W)."""
        logits: Tensor = self.net.classifier(self._features_of(images))
        return logits

    # Stages.

    @property
    def trained_stages(self) -> tuple[str, ...]:
        """The stages that the layers can be trained in, in order."""
        return next((layer.stages for layer in self.one_bit_layers.values()), ("full_precision",))

    @property
    def sign_activations(self) -> list[SignActivation]:
        """The 1-bit activations from input to output."""
        return [module for module in self.net.modules() if isinstance(module, SignActivation)]

    @property
    def stage(self) -> str:
        """The kind of the current stage, a key of ``pcnn_lightning.stages.STAGES``."""
        return "full_precision" if self._stage is None else self._stage.stage

    @property
    def stage_name(self) -> str:
        """What logs and files call the current stage: ``binary_2``, or ``to_binary`` while layers enter it."""
        if self._stage is None:
            return self.stage
        return self._name if self.has_entered else f"{ENTERING}{self._name}"

    @property
    def has_entered(self) -> bool:
        """Whether all layers are in the current stage."""
        return self.entered >= len(self.one_bit_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Hyperparameters, as the current stage overrides them."""
        return {**self.hparams, **({} if self._stage is None else self._stage.overrides)}

    def set_stage(self, stage: str) -> None:
        """Put every layer into ``stage``, and its activations as the model has them."""
        if stage not in self.trained_stages:
            raise ValueError(f"stage must be one of {', '.join(self.trained_stages)}, but got {stage!r}")
        if stage != "full_precision":
            self.take_stage(stage, Stage(cast(Any, stage)))

    def check_stage(self, name: str, stage: Stage) -> None:
        """Require that the network can be trained in ``stage``, with the arguments that it overrides.

        Raises:
            ValueError: names the stage, and what is allowed.
        """
        family = type(self).__name__
        if stage.stage not in self.trained_stages:
            raise ValueError(f"stage must be one of {', '.join(self.trained_stages)} for {family}, but got {name}")
        if stage.activations == "sign" and not self.sign_activations:
            raise ValueError(f"stage {name}: activations must be real for this {family}, but got sign")
        given = [*stage.overrides, *(["reinit_projection"] if stage.reinit_projection else [])]
        if unknown := [argument for argument in given if argument not in self.hparams]:
            raise ValueError(f"stage {name}: {unknown[0]} is not an argument of {family}")
        settings = {**self.hparams, **stage.overrides}
        try:
            check_choice("optimizer", settings["optimizer"], ("sgd", "adam"))
            check_number("momentum", settings["momentum"], 0, below=1)
            self.group_settings(settings)
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}") from None

    def take_stage(self, name: str, stage: Stage) -> None:
        """Train in ``stage`` from now on; with ``layer_by_layer``, the layers enter it by :meth:`enter_layers`."""
        self._name, self._stage, self.entered = name, stage, 0
        if not stage.layer_by_layer:
            self.enter_layers(len(self.one_bit_layers))

    def enter_layers(self, count: int) -> None:
        """Put the first ``count`` 1-bit layers, with the activations in front of them, into the current stage."""
        assert self._stage is not None
        if count <= self.entered:
            return
        self.entered = count
        entering = list(self.one_bit_layers.values())[:count]
        for layer in entering:
            layer.set_stage(self._stage.stage)
        modules = list(self.net.modules())
        for module in modules if self.has_entered else modules[: modules.index(entering[-1])]:
            if isinstance(module, SignActivation):
                module.enabled = self._stage.activations != "real"
        if self.hparams["compile"] and self._stage.layer_by_layer:
            torch.compiler.reset()  # a network may only be compiled so often for changes of its layers

    def begin_stage(self, name: str, epoch: int) -> None:
        """Go to a stage of the plan at the start of ``epoch``: schedules and the optimizer's state begin anew."""
        self.take_stage(name, self.plan[name])
        self.stage_start, self.stage_end = epoch, None
        self.trainer.strategy.optimizers = [self.configure_optimizers()]

    # Training.

    def setup(self, stage: str) -> None:
        check_trainer(self.trainer)
        use_atomic_io(self.trainer)
        if stage == "fit":
            self._take_plan()
            self.load_teacher()
            if self.hparams["class_weights"] == "balanced":
                cast(CrossEntropy, self.terms["cross_entropy"]).balance(class_counts(self.trainer))

    def _take_plan(self) -> None:
        """Take the plan that a callback has made of this run; without one, nothing of an earlier plan is left."""
        self.plan, self.next_plan, self.stage_end = self.next_plan, {}, None
        if not self.plan and self._stage is not None:
            self.take_stage(self.stage, Stage(cast(Any, self.stage), activations=self._stage.activations))

    def teardown(self, stage: str) -> None:
        self._teacher = None

    def load_teacher(self) -> None:
        """Load the teacher, if there is one. Training does so when it starts; evaluation does not need its file.

        Raises:
            InputError: if it cannot be loaded, or has other classes or channels.
        """
        if "distill_loss" in self.terms:
            hparams = self.hparams
            self._teacher = load_teacher(hparams["teacher"], hparams["num_classes"], hparams["in_channels"])

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._init_from = None  # what is loaded now is not to be replaced when training starts
        return super().load_state_dict(*args, **kwargs)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The groups of parameters, by their names in the logs.

        ``kernels`` are the latent kernels of 1-bit layers, ``others`` everything else that is learned at η₁; a network
        in full precision has only ``kernels``. The second parameters, such as ``projections``, are learned at η₂.
        """
        layers = list(self.one_bit_layers.values())
        if not layers:
            return {KERNELS: list(self.parameters())}
        groups: dict[str, list[nn.Parameter]] = {KERNELS: [layer.weight for layer in layers]}
        for layer in layers:
            if layer.second_parameter is not None:
                groups.setdefault(f"{layer.second_parameter}s", []).append(getattr(layer, layer.second_parameter))
        taken = {id(one) for group in groups.values() for one in group}
        return {**groups, OTHERS: [one for one in self.parameters() if id(one) not in taken]}

    def group_settings(self, settings: Mapping[str, Any]) -> dict[str, GroupSettings]:
        """Learning rate and weight decay of each kind of group.

        Args:
            settings: hyperparameters.

        Raises:
            ValueError: names the argument that is wrong, its value and what is allowed.
        """
        others = group_settings("eta1", settings["eta1"], settings, settings["weight_decay"])
        decay = settings["kernel_weight_decay"]
        if decay is None or settings["full_precision"]:
            return {KERNELS: others, OTHERS: others}
        check_number("kernel_weight_decay", decay, 0)
        return {KERNELS: GroupSettings(others.rate, decay), OTHERS: others}

    @property
    def learning_rates(self) -> dict[str, float]:
        """η₁ and, if there is one, η₂, by the groups of parameters that are learned at them."""
        return {one["name"]: one["lr"] for one in self._optimizer().param_groups if one["name"] != OTHERS}

    def configure_optimizers(self) -> Optimizer:
        self.groups = self.group_settings(self.settings)
        return make_optimizer(self.parameter_groups(), self.groups, self.settings)

    def prepare_features(self, *, compile: bool, channels_last: bool) -> None:
        """Lay out and compile the backbone, and the teacher, for training."""
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.net.to(memory_format=self._memory_format)
        if compile:
            self.net.features.compile()
        if self._teacher is not None:
            self._teacher.prepare(self.device, cast(torch.dtype, self.dtype), self._memory_format, compile=compile)

    def on_fit_start(self) -> None:
        self.divergence = DivergenceWatch()  # without the memory of an earlier fit
        if self._init_from is not None and self.trainer.ckpt_path is None:
            self.start_from(self._init_from)
        self._init_from = None  # a further fit goes on from what this one has learned
        self.prepare_features(compile=self.hparams["compile"], channels_last=self.hparams["channels_last"])

    def on_train_start(self) -> None:
        leave_finished_epoch(self.trainer)
        begin_optimization(self._optimizer(), self.groups, self, self.trainer)
        check_accumulation(self.hparams["accumulate"], self.trainer, self.terms)
        self._terms.train()  # a network may be fine-tuned in evaluation mode, but not its loss
        self.stage_start = min(self.stage_start, self.current_epoch)  # a loaded network may begin a new run
        for name, term in self.terms.items():
            known = self._stage is None or term.start in (self.plan or {*self.trained_stages, "binary"})
            if isinstance(term.start, str) and not known:
                stages = f"the stages are {', '.join(self.plan)}" if self.plan else "this run has no plan of stages"
                raise InputError(f"{name} is to begin in stage {term.start}, but {stages}")
            if not self.has_begun(term) and self._never_begins(term):
                rank_zero_warn(f"{name} takes no part: it begins at {term.start}, which this run does not reach")
        taught = self.terms.get("distill_loss")
        if taught is not None and self.hparams["task_loss_weight"] == 0 and not self.has_begun(taught):
            raise InputError(f"task_loss_weight must be positive until distill_loss begins ({taught.start}), but got 0")
        split_updates = self.hparams["accumulate"] > 1 or self.trainer.world_size > 1
        for layer in self.one_bit_layers.values():
            layer.begin_training(split_updates)
        self.zero_grad()  # of a run that was interrupted in this process
        self._within_update = self._pending is not None
        restore_update(self, self._pending or {})
        if self._random_state is not None:
            restore_random_state(self._random_state, self.trainer)
        self._pending = self._random_state = None
        self._logged_epoch = -1
        if self.trainer.ckpt_path is not None:  # the checkpoint may be of an epoch without further batches
            self._log_means()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        if batch_idx == 0:
            self._begin_epoch(labels)
        update = update_of(
            batch_idx, self.hparams["accumulate"], self.trainer.num_training_batches, self.trainer.is_last_batch
        )
        if update.position == 0:
            set_rates(self._optimizer(), self.groups, self, self.trainer, update.index)

        losses, logits = self.losses(images, labels, update.size * self.trainer.world_size)
        loss = torch.stack(list(losses.values())).sum()
        self.divergence.watch(loss, self.global_step)
        with synced_only_if(update.is_complete, self.trainer):
            self.manual_backward(loss / update.size)
        self._within_update = not update.is_complete
        if update.is_complete:
            update.rescale(self.parameters())
            self.step()

        losses = {name: value.detach() for name, value in {"loss": loss, **losses}.items()}
        self.train_means.add(losses, logits, labels)
        if batch_idx == 0 or self._logged_epoch != self.current_epoch:  # once an epoch is enough to log a metric
            self._log_means()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (batch_idx + 1) % every == 0:
            self.divergence.check(self)
        return losses

    def losses(self, images: Tensor, labels: Tensor, batches: int = 1) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms of the training loss by name, and the logits (B, num_classes).

        Args:
            images: (B, in_channels, H, W).
            labels: (B,), or their probabilities (B, num_classes).
            batches: number of batches and processes that the loss of an update is averaged over.
        """
        begun = {name: term for name, term in self.terms.items() if self.has_begun(term)}
        teacher_logits = None
        if self._teacher is not None and "distill_loss" in begun:
            # First, so that its activations do not come on top of those that wait for the backward pass.
            teacher_logits = self._teacher(images)
        outputs = self._outputs(images, labels, teacher_logits)
        return {name: term.value(outputs, batches) for name, term in begun.items()}, outputs.logits

    def has_begun(self, term: LossTerm) -> bool:
        """Whether a term takes part in the loss yet."""
        if isinstance(term.start, int):
            return self.current_epoch >= term.start
        names = list(self.plan)
        if term.start in names and self._name in names:
            return names.index(self._name) >= names.index(term.start)
        stages = self.trained_stages
        return term.start not in stages or stages.index(self.stage) >= stages.index(term.start)

    def _never_begins(self, term: LossTerm) -> bool:
        if isinstance(term.start, int):
            return term.start >= run_epochs(self, self.trainer)
        return not self.plan

    def step(self) -> None:
        """Step the optimizer with the gradients of an update."""
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        for term in self.terms.values():
            term.step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for layer in self.one_bit_layers.values():
            layer.before_step()
        # Under 16-mixed, gradients are unscaled here and not before.
        if self.hparams["gradient_clip"] is not None:
            self.clip_gradients(optimizer, self.hparams["gradient_clip"], "norm")

    def on_train_epoch_end(self) -> None:
        self.divergence.check(self)
        rates = {f"lr/{name}": rate for name, rate in self.learning_rates.items()}
        self.log_dict({**rates, "stage": float(STAGES[self.stage])})

    def _begin_epoch(self, labels: Tensor) -> None:
        # In the first batch and not in on_train_epoch_start, which Lightning skips after some resumes.
        check_labels(labels, self.hparams["num_classes"])
        self.train_means.reset()  # a checkpoint from the end of an epoch still holds its means
        for layer in self.one_bit_layers.values():
            layer.begin_epoch()

    def _outputs(self, images: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Outputs:
        features, layers = self._features_of(images), list(self.one_bit_layers.values())
        return Outputs(features, self.net.classifier(features), labels, layers, teacher_logits)

    def _features_of(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype, memory_format=self._memory_format)
        if not self.training:
            # Past the compiled call: evaluation would compile four more times, for its mode and its last batch.
            return cast(Tensor, self.net.features.forward(images))  # type: ignore[no-untyped-call]
        try:
            return cast(Tensor, self.net.features(images))
        except TorchDynamoException as error:
            raise compile_failed(error) from error

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return optimizer

    def _log_means(self) -> None:
        self._logged_epoch = self.current_epoch
        held = {f"train/{name}": mean for name, mean in self.train_means.held().items()}
        self.log_dict(held, on_step=False, on_epoch=True)

    # Evaluation.

    def on_validation_model_zero_grad(self) -> None:
        if not self._within_update:
            super().on_validation_model_zero_grad()

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        losses, _ = self._evaluate("val", batch, self.val_accuracies)
        self.divergence.watch(losses["cross_entropy"], self.global_step)

    def on_validation_epoch_end(self) -> None:
        self.divergence.check(self)

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure a batch and return ``labels`` (B,) and ``predictions`` (B,), for callbacks."""
        _, outputs = self._evaluate("test", batch, self.test_accuracies)
        return {"labels": outputs.labels, "predictions": outputs.logits.argmax(dim=1)}

    def predict_step(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Label (B,) and its probability (B,) for each of ``images`` (B, in_channels, H, W)."""
        probabilities, labels = self(images.to(self.dtype)).float().softmax(dim=1).max(dim=1)
        return {"label": labels, "probability": probabilities}

    def _begin_evaluation(self) -> None:
        layers = list(self.one_bit_layers.values())
        for term in self.terms.values():
            term.begin_evaluation(layers)

    def _evaluate(
        self, split: str, batch: tuple[Tensor, Tensor], metrics: MetricCollection
    ) -> tuple[dict[str, Tensor], Outputs]:
        outputs = self._outputs(*batch)
        terms = {name: term for name, term in self.terms.items() if term.in_evaluation}
        others = {name: term for name, term in self.terms.items() if not term.training_only and self.has_begun(term)}
        shown = {} if split == "test" else others
        batches = self.hparams.get("accumulate", 1) * self.trainer.world_size
        losses = {name: term.value(outputs, batches) for name, term in {**terms, **shown}.items()}
        losses["loss"] = torch.stack([losses[name] for name in terms]).sum()
        metrics.update(outputs.logits, outputs.labels)
        size = len(outputs.labels)
        self.log_dict({f"{split}/{name}": loss for name, loss in losses.items()}, batch_size=size, sync_dist=True)
        for name, metric in metrics.items(keep_base=True):
            self.log(f"{split}/{name}", metric, batch_size=size, prog_bar=name == "accuracy")
        return losses, outputs

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.divergence.check_state(self)
        checkpoint["one_bit"] = save_run(self)
        checkpoint["random_state"] = random_state(self.trainer)
        if self._within_update:
            checkpoint["pending"] = pending_update(self)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as Lightning does, from a file that is checked first.

        Raises:
            InputError: if it is damaged or not written by pcnn_lightning.
        """
        if isinstance(checkpoint_path, (str, os.PathLike)):
            load_checkpoint(str(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        check_run(self, checkpoint, fitting)
        self._pending = checkpoint.get("pending") if fitting else None
        self._random_state = checkpoint.get("random_state") if fitting else None
        try:
            self.restore(checkpoint["one_bit"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the checkpoint is damaged: its record of the run cannot be used ({type(error).__name__}: {error})"
            ) from error

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore the record of a run; see :func:`save_run`."""
        self.train_means.restore(saved["train_means"], self._trainer is None or self.global_rank == 0)
        self._name, self.entered = saved["stage_name"], saved["entered"]
        self._stage = restored_stage(saved, self.plan)
        for layer, stage in zip(self.one_bit_layers.values(), saved["layer_stages"], strict=True):
            layer.set_stage(stage)
        for activation, enabled in zip(self.sign_activations, saved["sign_activations"], strict=True):
            activation.enabled = enabled
        self.stage_start, self.stage_end = saved["stage_start"], None  # its end is for the callback to say

    def start_from(self, path: str) -> None:
        """Take the network, but not the stage, from a checkpoint."""
        state = load_checkpoint(path)["state_dict"]
        network = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
        check_same_tensors(self.net.state_dict(), network)
        self.net.load_state_dict(network)


def check_start(name: str, start: Any) -> None:
    """Require an epoch or the name of a stage."""
    is_stage = isinstance(start, str) and is_stage_name(start)
    if not is_stage and (type(start) is not int or start < 0):
        raise ValueError(f"{name} must be an epoch or a stage, such as binary or binary_2, but got {start!r}")


def plain_convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    *,
    planes: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    """An ordinary convolution in place of a 1-bit layer of any number of planes."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
