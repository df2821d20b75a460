"""``test``, ``validate`` and ``predict``, from checkpoints and packed files."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import DIGITS, FIT, KEEP, QUIET, TRAINING, make_folder

from pcnn_lightning import PCNN, Digits, ImageFolder

ROOT = Path(__file__).parents[2]


class TestPredict:
    def test_digits(self, command, trained):
        path = trained / "last.ckpt"
        run = command("predict", *DIGITS, *QUIET, f"--ckpt_path={path}", "--output=new/folder/out.csv")
        assert run.code == 0, run.err
        assert "360" in run.out
        assert "new/folder/out.csv" in run.out
        with Path("new/folder/out.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["image", "label", "probability"]
        assert [row[0] for row in rows] == [str(number) for number in range(360)]
        data, model = Digits(image_size=8), PCNN.load_from_checkpoint(path).eval()
        images = data.on_after_batch_transfer(data.predict_set.__getitems__(list(range(360))), 0)
        with torch.no_grad():
            expected, labels = model(images).softmax(1).max(1)
        assert [row[1] for row in rows] == [data.classes[label] for label in labels]
        found = torch.tensor([float(row[2]) for row in rows])
        assert (found > 0).all()
        assert (found <= 1).all()
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)

    def test_default_output(self, command, trained):
        assert command("predict", *DIGITS, *QUIET, f"--ckpt_path={trained / 'last.ckpt'}").code == 0
        assert len(Path("predictions.csv").read_text().splitlines()) == 361

    def test_folder(self, command, tmp_path):
        images = make_folder(tmp_path / "images", {"cät": 4, "dog, small": 4})
        data = ["--data=ImageFolder", "--data.root=images", "--data.batch_size=3"]
        assert command("fit", *data, *TRAINING, *KEEP).code == 0
        wanted = tmp_path / "wanted"
        (wanted / "deep").mkdir(parents=True)
        (images / "test" / "cät" / "0.png").rename(wanted / "deep" / "b.png")
        (images / "test" / "cät" / "1.png").rename(wanted / "a, b.png")
        (wanted / "notes.txt").write_text("no image")
        run = command("predict", *data, *QUIET, "--data.predict_dir=wanted", "--ckpt_path=kept/last.ckpt")
        assert run.code == 0, run.err
        with Path("predictions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["image"] for row in rows] == ["a, b.png", "deep/b.png"]
        assert {row["label"] for row in rows} <= {"cät", "dog, small"}
        assert command("predict", *data, *QUIET, "--ckpt_path=kept/last.ckpt", "--output=test.csv").code == 0
        with Path("test.csv").open(newline="", encoding="utf-8") as file:
            names = [row["image"] for row in csv.DictReader(file)]
        assert names == ImageFolder("images").predict_names()
        assert names[0] == "cät/2.png"

    @pytest.mark.parametrize("output", ["taken/out.csv", "folder"])
    def test_output_that_cannot_be_written(self, command, tmp_path, trained, output):
        (tmp_path / "taken").write_text("a file")
        (tmp_path / "folder").mkdir()
        run = command("predict", *DIGITS, *QUIET, f"--ckpt_path={trained / 'last.ckpt'}", f"--output={output}")
        run.is_refused(output)


# --- packed files ---------------------------------------------------------------------------------------------------


class OtherDigits(Digits):
    """Digits with another normalization."""

    mean = (0.5,)


def test_a_packed_file_gives_the_results_of_its_checkpoint(command, trained, packed):
    tested, rows = [], []
    for path in (trained / "last.ckpt", packed):
        run = command("test", *DIGITS, *QUIET, f"--ckpt_path={path}")
        assert run.code == 0, run.err
        tested.append(run.cli.trainer.callback_metrics)
        assert command("predict", *DIGITS, *QUIET, "--ckpt_path", path, "--output=p.csv").code == 0
        rows.append(Path("p.csv").read_text())
    checkpoint, file = tested
    assert set(checkpoint) - {"test/projection_loss"} == set(file) >= {"test/loss", "test/accuracy"}
    for name in ("test/accuracy", "test/cross_entropy"):
        assert torch.equal(checkpoint[name], file[name])
    assert torch.equal(file["test/loss"], file["test/cross_entropy"])
    assert rows[0] == rows[1]
    assert len(rows[0].splitlines()) == 361
    assert {"val/loss", "val/accuracy"} <= set(
        command("validate", *DIGITS, *QUIET, f"--ckpt_path={packed}").cli.trainer.callback_metrics
    )


def labels_and_probabilities(path):
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["label"] for row in rows], torch.tensor([float(row["probability"]) for row in rows])


@pytest.mark.parametrize("source", ["last.ckpt", "ternary.ckpt", "digits.safetensors"])
def test_openvino_gives_the_results_of_torch(command, trained, packed, source):
    flags = [*DIGITS, *QUIET, f"--ckpt_path={trained / source}"]
    tested = []
    for runtime in ("torch", "openvino"):
        run = command("test", *flags, f"--runtime={runtime}")
        assert run.code == 0, run.err
        tested.append(run.cli.trainer.callback_metrics)
        assert command("predict", *flags, f"--runtime={runtime}", f"--output={runtime}.csv").code == 0
    torchs, openvinos = tested
    assert set(torchs) - {"test/projection_loss"} == set(openvinos) >= {"test/loss", "test/accuracy"}
    assert torch.equal(torchs["test/accuracy"], openvinos["test/accuracy"])
    assert run.cli.trainer.lightning_module.stage_name == ("ternary" if "ternary" in source else "binary")
    torch.testing.assert_close(openvinos["test/cross_entropy"], torchs["test/cross_entropy"], rtol=0, atol=1e-5)
    (labels, probabilities), (found, close) = (
        labels_and_probabilities(f"{name}.csv") for name in ("torch", "openvino")
    )
    assert len(labels) == 360
    assert found == labels
    torch.testing.assert_close(close, probabilities, rtol=0, atol=1e-5)


def test_openvino_of_a_folder_of_images(command, tmp_path):
    make_folder(tmp_path / "images", {"cat": 4, "dog": 4})
    data = ["--data=ImageFolder", "--data.root=images", "--data.batch_size=3"]
    assert command("fit", *data, *TRAINING, *KEEP).code == 0
    flags = [*data, *QUIET, "--ckpt_path=kept/last.ckpt"]
    assert command("predict", *flags).code == 0
    assert command("predict", *flags, "--runtime=openvino", "--output=openvino.csv").code == 0
    assert labels_and_probabilities("openvino.csv")[0] == labels_and_probabilities("predictions.csv")[0]


def test_openvino_refusals(command, trained, packed, monkeypatch):
    command("test", *DIGITS, *QUIET, f"--ckpt_path={packed}", "--runtime=onnx").is_usage_error("runtime", "openvino")
    other = [*DIGITS, *QUIET, "--data.image_size=12", f"--ckpt_path={packed}", "--runtime=openvino"]
    command("test", *other).is_refused(str(packed), "image_shape (1, 8, 8)", "(1, 12, 12)")
    monkeypatch.setitem(sys.modules, "openvino", None)
    for path in (trained / "last.ckpt", packed):
        run = command("predict", *DIGITS, *QUIET, f"--ckpt_path={path}", "--runtime=openvino")
        run.is_refused("OpenVINO is not installed", ".[openvino]")


def test_a_packed_file_overrides_the_model_of_the_configuration(command, packed):
    model = ["--model=MCN", "--model.planes=3", "--model.eta1=0.5"]
    run = command("test", f"--ckpt_path={packed}", *DIGITS, *QUIET, "--config", ROOT / "configs/digits.yaml", *model)
    assert run.code == 0, run.err
    assert run.cli.model.net.description.widths == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("data", "mentioned"),
    [
        ([*DIGITS, "--data.image_size=12"], ["image_shape (1, 8, 8)", "(1, 12, 12)"]),
        ([*DIGITS, f"--data={__name__}.OtherDigits"], ["mean (0.3049,)", "(0.5,)"]),
        (["--data=cli_helpers.WrongLabels", "--data.label=0"], ["num_classes 10", "3"]),
    ],
    ids=["size", "mean", "classes"],
)
def test_a_packed_file_is_refused_for_other_data(command, packed, data, mentioned):
    command("test", *data, *QUIET, f"--ckpt_path={packed}").is_refused(str(packed), *mentioned)


@pytest.mark.parametrize("flag", ["--ckpt_path", "--model.init_from"])
def test_a_packed_file_cannot_be_trained(command, packed, flag):
    command(*FIT, f"{flag}={packed}").is_refused(str(packed), "packed", "cannot be trained")
    Path("network.yaml").write_text(f"ckpt_path: {packed}")
    command("test", *DIGITS, *TRAINING, "--config=network.yaml").is_refused(str(packed), "the flag --ckpt_path")


def test_a_damaged_packed_file_is_refused(command, packed):
    Path("bad.safetensors").write_bytes(packed.read_bytes()[:-1])
    command("test", *DIGITS, *QUIET, "--ckpt_path=bad.safetensors").is_refused("bad.safetensors", "damaged")


def test_other_class_names_are_refused(packed, monkeypatch, command):
    monkeypatch.setattr(Digits, "classes", [*"abcdefghij"])
    command("predict", *DIGITS, *QUIET, f"--ckpt_path={packed}").is_refused(str(packed), "classes", "'a'", "'0'")
