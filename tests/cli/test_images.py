"""What commands say of images, and what they need none for."""

import csv
from pathlib import Path

import pytest
from cli_helpers import DIGITS, KEEP, NETWORK, QUIET, TRAINING, load, make_folder
from PIL import Image

from pcnn_lightning import Digits
from pcnn_lightning.cli import parser

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDER = ["--data=ImageFolder", "--data.root=images", "--data.batch_size=4"]


def rows(path: str = "predictions.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- predict without the folder of the data set ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--data.grayscale=true"], ["--data.image_size=6", "--data.in_memory=false"]])
def test_images_are_predicted_from_a_file_alone_as_with_its_data_set(command, tmp_path, options):
    make_folder(tmp_path / "images", {"cät": 4, "dog": 4})
    data = [*FOLDER, *options]
    assert command("fit", *data, *TRAINING, *KEEP).code == 0
    assert command("export", *data, *QUIET, "--ckpt_path=kept/last.ckpt", "--output=n.safetensors").code == 0
    assert command("predict", *data, *QUIET, "--ckpt_path=kept/last.ckpt").code == 0
    expected = rows()
    (tmp_path / "images").rename(tmp_path / "new")
    for path in ("kept/last.ckpt", "n.safetensors"):
        # A packed file does not tell whether images were read from disk.
        told = [one for one in options if "in_memory" in one and path.endswith("safetensors")]
        given = ["--data=ImageFolder", "--data.predict_dir=new/test", *told, f"--ckpt_path={path}"]
        run = command("predict", *QUIET, *given)
        assert run.code == 0, run.err
        assert rows() == expected, path
    assert {row["label"] for row in expected} <= {"cät", "dog"}


@pytest.mark.parametrize("name", ["last.ckpt", "digits.safetensors"])
def test_a_network_of_digits_predicts_files(command, tmp_path, trained, packed, name):
    """Gray images, their size, mean and deviation come from the file; the labels are those of the digits themselves."""
    assert command("predict", *DIGITS, *QUIET, f"--ckpt_path={trained / name}").code == 0
    expected = rows()[:20]
    images = Digits(image_size=8).predict_set.__getitems__(list(range(20))).images
    (tmp_path / "new").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"new/{number:02d}.png")
    run = command("predict", *QUIET, "--data=ImageFolder", "--data.predict_dir=new", f"--ckpt_path={trained / name}")
    assert run.code == 0, run.err
    assert [(row["label"], row["probability"]) for row in rows()] == [
        (row["label"], row["probability"]) for row in expected
    ]


def test_what_the_user_names_is_kept(command, tmp_path, packed):
    make_folder(tmp_path / "new", {"a": 2}, splits=("b",))
    given = ["--data=ImageFolder", "--data.predict_dir=new", f"--ckpt_path={packed}"]
    command("predict", *QUIET, *given, "--data.image_size=9").is_refused("image_shape", "(1, 9, 9)")
    command("predict", *QUIET, *given, "--data.mean=[0.4]").is_refused("mean", "0.4")


def test_without_a_file_that_tells_the_classes_the_folder_is_needed(command, tmp_path, trained):
    make_folder(tmp_path / "new", {"a": 2}, splits=("b",))
    checkpoint = load(trained / "last.ckpt")
    assert checkpoint["Digits"]["classes"] == list("0123456789")
    given = ["--data=ImageFolder", "--data.predict_dir=new", *NETWORK]
    command("predict", *QUIET, *given, "--ckpt_path=best").is_refused("data has no folder train, val or test")


def test_export_needs_no_images_either(command, tmp_path):
    make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
    assert command("fit", *FOLDER, *TRAINING, *KEEP).code == 0
    assert command("export", *FOLDER, *QUIET, "--ckpt_path=kept/last.ckpt", "--output=one.safetensors").code == 0
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    given = ["--data=ImageFolder", "--ckpt_path=kept/last.ckpt", "--output=other.safetensors"]
    run = command("export", *QUIET, *given)
    assert run.code == 0, run.err
    assert Path("one.safetensors").read_bytes() == Path("other.safetensors").read_bytes()


# --- summary without images ------------------------------------------------------------------------------------------


def test_summary_needs_no_images(command, tmp_path):
    run = command("summary", f"--config={CONFIGS / 'imagenet_resnet18.yaml'}", *QUIET)
    assert run.code == 0, run.err
    assert "Operations on 3x224x224" in run.out
    assert "33.6 Mbit" in run.out  # as published
    assert not list(tmp_path.iterdir())


def test_summary_downloads_nothing(command, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it is opened")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    run = command("summary", f"--config={CONFIGS / 'cifar.yaml'}", *QUIET)
    assert run.code == 0, run.err
    assert "Operations on 3x32x32" in run.out
    assert not list(tmp_path.iterdir())


# --- fit -------------------------------------------------------------------------------------------------------------


def test_images_of_several_sizes_are_refused_with_the_sizes(command, tmp_path):
    make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
    Image.new("RGB", (20, 9)).save("images/train/dog/0.png")
    run = command("fit", *FOLDER, *TRAINING)
    run.is_refused("16 images are of 2 sizes, from 8×8 to 20×9: set --data.image_size")
    assert command("fit", *FOLDER, *TRAINING, "--data.image_size=8").code == 0


@pytest.mark.parametrize(("free", "warned"), [(1000, True), (10**8, False), (None, False)])
def test_a_step_that_memory_cannot_hold_is_warned_about(command, tmp_path, monkeypatch, free, warned):
    make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
    monkeypatch.setattr(parser, "available_memory", lambda: free)
    shown = [one for one in TRAINING if "model_summary" not in one]
    run = command("fit", *FOLDER, *shown)
    assert run.code == 0, run.err
    assert ("warning: a training step on 4 images of 8×8 takes" in run.err) == warned
    assert len(run.err.splitlines()) == warned
