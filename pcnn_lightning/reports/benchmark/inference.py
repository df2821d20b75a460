"""Benchmark of CPU inference: a network and its full-precision twin, from raw images to labels, in each runtime."""

import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from pcnn_lightning.deploy import PackedNetwork, compile_c, compile_openvino, save_onnx
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules import OneBitClassifier, describe
from pcnn_lightning.reports.benchmark.measure import Report, Round, Setting, Stopwatch, compare_rounds

Classify = Callable[[Tensor], object]
"""A function that labels images (B, C, H, W) uint8."""


def benchmark_inference(
    model: OneBitClassifier, datamodule: LightningDataModule, batch_size: int, setting: Setting
) -> Report:
    """Time a network from uint8 images to labels, including normalization, on the CPU with torch's number of threads.

    The contenders are the full-precision twin in torch, in channels-last layout, and in OpenVINO; the frozen network in
    torch, ONNX Runtime, OpenVINO and C, which uses one thread. What is not installed takes no part, with a warning.
    Weights do not affect the times, so the model need not be trained.

    Args:
        model: the model to deploy; it is put into its last stage.
        datamodule: provides the size and normalization of the images; no images are read.
        batch_size: B.
        setting: number of rounds; device, precision and compilation concern training and are ignored.

    Raises:
        InputError: if the datamodule does not describe its images.
    """
    model = model.eval().cpu()
    model.set_stage(model.trained_stages[-1])
    description = describe(model, datamodule)
    frozen = PackedNetwork.of(model.net, description)
    conversion = description.conversion and {**description.conversion, "layers": {}, "activations": "real"}
    of_twin = replace(description, stage="full_precision", sign_activations=False, layer={}, conversion=conversion)
    twin = PackedNetwork.of(model.twin().net, of_twin)
    makers: dict[str, Callable[[], Classify]] = {
        "full precision, torch": lambda: partial(_classify_channels_last, _channels_last(twin)),
        "full precision, OpenVINO": lambda: compile_openvino(twin).classify,
        "frozen, torch": lambda: frozen.classify,
        "frozen, ONNX Runtime": lambda: _in_onnxruntime(frozen),
        "frozen, OpenVINO": lambda: compile_openvino(frozen).classify,
        "frozen, C": lambda: compile_c(frozen).classify,
    }
    contenders: dict[str, Classify] = {}
    for name, make in makers.items():
        try:
            contenders[name] = make()
        except InputError as error:
            warnings.warn(f"{name} takes no part: {error}", stacklevel=2)
    shape = (description.in_channels, *description.image_size)
    images = torch.randint(0, 256, (batch_size, *shape), dtype=torch.uint8)
    what = f"uint8 images to labels, {description.backbone}, {'×'.join(map(str, (batch_size, *shape)))}"
    rounds = {name: _round(classify, images) for name, classify in contenders.items()}
    where = replace(setting, device=torch.device("cpu"), precision="32-true", compiled=False, channels_last=False)
    return compare_rounds(what, batch_size, rounds, where, memory=False)  # not all runtimes allocate through torch


def _round(classify: Classify, images: Tensor) -> Round:
    def once(watch: Stopwatch) -> None:
        classify(images[:1])  # so that caches hold its weights, not those of the contender before
        watch.start()
        classify(images)
        watch.mark("labels")

    return once


@torch.no_grad()
def _classify_channels_last(network: PackedNetwork, images: Tensor) -> Tensor:
    pixels = network.preprocess(images).contiguous(memory_format=torch.channels_last)
    labels: Tensor = network(pixels).argmax(dim=1)
    return labels


def _channels_last(network: PackedNetwork) -> PackedNetwork:
    return deepcopy(network).to(memory_format=torch.channels_last)


def _in_onnxruntime(network: PackedNetwork) -> Classify:
    if find_spec("onnxruntime") is None:
        raise InputError("onnxruntime is not installed: pip install onnxruntime")
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        save_onnx(network, path, network.description)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise its threads keep spinning for a while on the cores that the next contender needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def classify(images: Tensor) -> object:
        (logits,) = session.run(None, {"images": images.numpy()})
        return np.argmax(logits, axis=1)

    return classify
