"""Files that cannot be read: all are named, or left out alike in all runs and processes."""

import logging
from pathlib import Path

import pytest
import torch
from made_images import make_folder
from PIL import Image
from tiny import tiny_pcnn, tiny_trainer

from pcnn_lightning.data import ImageFolder, encoded
from pcnn_lightning.errors import InputError

PLACES = [{}, {"image_size": 4}, {"image_size": 8, "in_memory": False}]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    return lambda: [record.message for record in caplog.records]


def folder_with(tmp_path: Path, *broken: str, names=("cat", "dog")) -> Path:
    counts = dict.fromkeys(names, 12)
    root = make_folder(tmp_path / "images", {"train": counts, "test": counts})
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return root


BROKEN = ("train/cat/003.png", "train/dog/000.png", "test/dog/011.png")


@pytest.mark.parametrize("options", PLACES[:2])
def test_all_of_them_are_named_in_one_message_whatever_the_split(tmp_path, options):
    root = folder_with(tmp_path, *BROKEN)
    with pytest.raises(InputError) as caught:
        ImageFolder(str(root), **options).setup("fit")
    message = str(caught.value)
    assert message.startswith("3 files: ")
    assert [message.count(str(root / name)) for name in BROKEN] == [1, 1, 1]
    assert message.endswith("leave them out by --data.skip_corrupt true.")
    assert "\n" not in message


def test_many_of_them_are_listed_in_a_file(tmp_path):
    broken = [f"train/cat/{number:03d}.png" for number in range(12)]
    root = folder_with(tmp_path, *broken)
    data = ImageFolder(str(root))
    trainer = tiny_trainer(default_root_dir=str(tmp_path / "run"))
    with pytest.raises(
        InputError, match=r"^12 files: .*/009\.png .*; and 2 more \(all of them: .*corrupt_images\.txt\)"
    ):
        trainer.fit(tiny_pcnn(in_channels=3, num_classes=2), data)
    listed = (tmp_path / "run/corrupt_images.txt").read_text().splitlines()
    assert listed == [str(root / name) for name in broken]


@pytest.mark.parametrize("options", PLACES)
def test_leaving_them_out_equals_removing_them(tmp_path, options, said):
    root = folder_with(tmp_path, *BROKEN)

    def batches(data: ImageFolder) -> list[torch.Tensor]:
        data.setup("fit")
        names = ("train", "val", "test", "predict")
        loaders = [getattr(data, f"{name}_dataloader")() for name in names]
        return [part for loader in loaders for batch in loader for part in batch[:2] if part is not None]

    skipping = ImageFolder(str(root), skip_corrupt=True, batch_size=4, **options)
    found, names = batches(skipping), skipping.predict_names()
    assert f"train: 2 of 24 images are corrupt and left out: {root / BROKEN[0]}, {root / BROKEN[1]}" in said()
    for name in BROKEN:
        (root / name).unlink()
    removed = ImageFolder(str(root), batch_size=4, **options)
    for one, other in zip(found, batches(removed), strict=True):
        assert torch.equal(one, other)
    assert names == removed.predict_names()
    assert len(names) == 23


@pytest.mark.parametrize("available", [10**9, 0])
def test_names_of_predictions_are_those_of_the_images_left(tmp_path, monkeypatch, available):
    monkeypatch.setattr(encoded, "available_memory", lambda: available)
    root = folder_with(tmp_path, "test/cat/000.png")
    data = ImageFolder(str(root), predict_dir=str(root / "test"), skip_corrupt=True)
    names = data.predict_names()
    assert len(names) == len(data.predict_set) == 23
    assert names[0] == "cat/001.png"
    first = data.predict_set.__getitems__([0]).images[0].permute(1, 2, 0)
    assert first.tolist() == torch.tensor(list(Image.open(root / "test/cat/001.png").getdata())).view(8, 8, 3).tolist()


@pytest.mark.parametrize("options", PLACES)
def test_a_class_of_corrupt_images_alone_is_refused(tmp_path, options):
    root = folder_with(tmp_path, *(f"train/dog/{number:03d}.png" for number in range(12)))
    with pytest.raises(InputError, match="train holds only corrupt images of 1 of 2 classes: dog"):
        ImageFolder(str(root), skip_corrupt=True, **options).setup("fit")


@pytest.mark.parametrize("options", PLACES)
def test_files_that_may_be_readable_elsewhere_are_not_left_out(tmp_path, options):
    root = folder_with(tmp_path, *BROKEN)
    (root / "train/dog/gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"^\S*gone\.png cannot be read as an image: No such file") as caught:
        ImageFolder(str(root), skip_corrupt=True, **options).setup("fit")
    assert "skip_corrupt" not in str(caught.value)


def test_lack_of_memory_is_not_taken_for_corrupt_images(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    root = folder_with(tmp_path)
    monkeypatch.setattr("PIL.Image.Image.convert", fail)
    with pytest.raises(MemoryError):
        ImageFolder(str(root), skip_corrupt=True).setup("fit")


def run(root: Path, path: str | None = None, **options) -> None:
    model = tiny_pcnn(in_channels=3, num_classes=2)
    data = ImageFolder(str(root), skip_corrupt=True, batch_size=4, **options)
    trainer = tiny_trainer(max_epochs=1 if path is None else 2, default_root_dir=str(root.parent))
    trainer.fit(model, data, ckpt_path=path)
    trainer.save_checkpoint(root.parent / "run.ckpt")


def test_a_run_goes_on_with_the_same_images_only(tmp_path):
    root = folder_with(tmp_path, *BROKEN)
    run(root)
    run(root, str(tmp_path / "run.ckpt"))
    whole = (root / "train/cat/001.png").read_bytes()
    (root / BROKEN[0]).write_bytes(whole)
    with pytest.raises(
        InputError, match=r"train/cat/003\.png, train/dog/000\.png were .* now train/dog/000\.png: restore"
    ):
        run(root, str(tmp_path / "run.ckpt"))


def test_a_run_does_not_go_on_with_other_classes(tmp_path):
    root = folder_with(tmp_path)
    run(root)
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "zebra")
    with pytest.raises(InputError, match="checkpoint is of the classes cat, dog, but these images are of dog, zebra"):
        run(root, str(tmp_path / "run.ckpt"))


class Processes:
    """What a data module asks of a Trainer of two processes, the first of which left out ``of_first``."""

    world_size, num_devices, default_root_dir = 2, 2, "."

    def __init__(self, of_first: list[str]) -> None:
        self.of_first, self.strategy = of_first, self

    def broadcast(self, _: list[str]) -> list[str]:
        return self.of_first


def test_processes_that_leave_out_other_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = folder_with(tmp_path, *BROKEN)
    data = ImageFolder(str(root), skip_corrupt=True)
    own = [str(root / name) for name in BROKEN[:2]]
    data.trainer = Processes(own)  # type: ignore[assignment]
    assert len(data.load("train")) == 22
    data.trainer = Processes(own[:1])  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"one process can read what another cannot: \S*dog/000\.png$"):
        data.load("train")


# --- what is said ---------------------------------------------------------------------------------------------------


def test_what_is_done_with_images_is_said(tmp_path, said):
    root = folder_with(tmp_path)
    ImageFolder(str(root)).setup("fit")
    assert said() == ["train: 24 images of 8×8, held in memory (4.6 kB)"]
    Image.new("RGB", (16, 8)).save(root / "train/cat/000.png")
    ImageFolder(str(root), image_size=4).setup("fit")
    ImageFolder(str(root), image_size=4, in_memory=False).setup("test")
    assert said()[1:] == [
        "train: 24 images of 2 sizes, from 8×8 to 16×8, resized to 4×4, held in memory (1.2 kB)",
        "test: 24 images of 8×8, resized to 4×4, read from disk",
    ]


@pytest.mark.parametrize(("grayscale", "noted"), [(None, True), (False, False), (True, False)])
def test_it_is_said_that_all_images_are_gray_unless_that_is_settled(tmp_path, said, grayscale, noted):
    root = folder_with(tmp_path)
    for file in root.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    data = ImageFolder(str(root), grayscale=grayscale)
    data.setup("fit")
    assert any("--data.grayscale true" in line for line in said()) == noted
    assert data.train_set.__getitems__([0]).images.shape[1] == data.in_channels == (1 if grayscale else 3)
