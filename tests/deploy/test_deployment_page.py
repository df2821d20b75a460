"""The examples of docs/deployment.md label an image with exported files, where torch is needed only with PyTorch's."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from c_programs import needs
from PIL import Image
from trained_networks import trained_digits

from pcnn_lightning.deploy import (
    compile_openvino,
    load_packed,
    save_c,
    save_onnx,
    save_openvino,
    save_packed,
    save_torch,
)
from pcnn_lightning.modules import describe

PAGE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
EXPORTERS = {
    "digits.xml": save_openvino,
    "digits.c": save_c,
    "digits.onnx": save_onnx,
    "digits.safetensors": save_packed,
    "digits.pt2": save_torch,
}
WITHOUT_TORCH = "import sys\nsys.modules['torch'] = sys.modules['pcnn_lightning'] = None\n"


def examples(section, language):
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def output(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a network in all formats and an image, the image, and its class."""
    model, data = trained_digits("PCNN")
    folder = tmp_path_factory.mktemp("exported")
    for name, save in EXPORTERS.items():
        save(model.net, folder / name, describe(model, data))
    images = torch.cat([batch[0] for batch in data.test_dataloader()])
    labels = load_packed(folder / "digits.safetensors").classify(images)
    place = int((labels != labels.mode().values).nonzero()[0])  # not of the class that most images have
    Image.fromarray(images[place, 0].numpy()).save(folder / "image.png")
    return folder, images[place : place + 1], str(int(labels[place]))


@pytest.fixture(autouse=True)
def _in_its_folder(exported, monkeypatch):
    monkeypatch.chdir(exported[0])


@pytest.mark.parametrize(
    ("section", "before"),
    [
        ("x86 processors: OpenVINO", WITHOUT_TORCH),
        ("Browsers and other runtimes: ONNX", WITHOUT_TORCH),
        ("PyTorch: packed files", "import sys\nsys.modules['lightning'] = None\n"),
        ("PyTorch: torch.export", "import sys\nsys.modules['pcnn_lightning'] = None\n"),
    ],
    ids=["openvino", "onnx", "packed", "torch"],
)
def test_python(exported, section, before):
    assert output(before + examples(section, "python")[0]) == exported[2]


def test_openvino_in_this_package(exported):
    """The second example takes ``images``."""
    _, images, label = exported
    names = {"images": images}
    exec(examples("x86 processors: OpenVINO", "python")[1], names)
    assert names["labels"].tolist() == compile_openvino("digits.xml").classify(images).tolist() == [int(label)]


def test_c(exported):
    needs("cc")
    section = "ARM boards and other computers: C"
    output(WITHOUT_TORCH + examples(section, "python")[0])
    assert np.fromfile("image.raw", np.uint8).tolist() == exported[1].flatten().tolist()
    Path("label.c").write_text(examples(section, "c")[0], encoding="utf-8")
    self_test, label = ("".join(lines) for lines in examples(section, "sh"))
    assert "4 of 4 labels agree" in subprocess.check_output(self_test, shell=True, text=True)
    assert subprocess.check_output(label, shell=True, text=True).strip() == exported[2]


def test_flash_of_a_microcontroller():
    needs("arm-none-eabi-gcc", "arm-none-eabi-size")
    (commands,) = examples("Microcontrollers: C", "sh")
    assert "text" in subprocess.check_output(f"set -e\n{commands}", shell=True, text=True)
