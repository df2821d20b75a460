"""Tars, against the folders of the same images, and everything that can be wrong with them."""

import gzip
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import make_folder, make_tar, pack, random_image
from test_training import Recorder, Seen, trainer_for

from pcnn_lightning.cli import main
from pcnn_lightning.data import ImageFolder, WebDataset, tars
from pcnn_lightning.data.datasets import MemoryImages
from pcnn_lightning.data.decode import decode
from pcnn_lightning.data.disk import DiskImages
from pcnn_lightning.data.tars import expand, in_order, read_indexes, scan
from pcnn_lightning.errors import InputError

COUNTS = {"train": {"cat": 14, "dog": 9, "owl": 10}, "test": {"cat": 2, "dog": 3, "owl": 2}}
DISK = {"image_size": 8, "in_memory": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with JPEGs of several sizes among PNGs, and names that are sorted otherwise without their suffix."""
    folder = make_folder(tmp_path_factory.mktemp("folder"), COUNTS, size=(20, 14))
    rng = np.random.default_rng(1)
    for number, file in enumerate(sorted(folder.rglob("*.png"))[::2]):
        file.unlink()
        random_image(rng, 16 + number, 40 - number).save(file.with_suffix(".jpeg"))
    (file,) = (folder / "train/dog").glob("003.*")
    file.rename(file.with_stem("002-b"))
    return folder


@pytest.fixture
def root(folder, tmp_path):
    return pack(folder, tmp_path / "tars")


def jpeg(tmp_path: Path) -> bytes:
    random_image(np.random.default_rng(0)).save(tmp_path / "one.jpg")
    return (tmp_path / "one.jpg").read_bytes()


def batches(data: ImageFolder | WebDataset, epoch: int = 1) -> list[torch.Tensor]:
    data.setup("fit")
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
    loaders[0].sampler.set_epoch(epoch)  # type: ignore[union-attr]
    return [part for loader in loaders for batch in loader for part in batch if part is not None]  # type: ignore[union-attr]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 10 and all(map(torch.equal, one, other))


# --- as from a folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [DISK, {"image_size": 8}, {**DISK, "grayscale": True}, {**DISK, "train_size": 20}])
def test_batches_are_those_of_the_folder(folder, root, options):
    expected = batches(ImageFolder(str(folder), batch_size=4, **options))
    data = WebDataset(str(root), batch_size=4, **options)
    assert same(batches(data), expected)
    assert isinstance(data.train_set, DiskImages if "in_memory" in options else MemoryImages)
    assert data.classes == ["0", "1", "2"]
    again = pack(folder, root.parent / "again", tars=5, seed=1)
    assert same(batches(WebDataset(str(again), batch_size=4, num_workers=2, **options)), expected), "packed anew"
    assert not same(batches(data, epoch=2), expected)


def test_names_to_predict_are_those_within_the_tars(root):
    data = WebDataset(str(root), batch_size=4)
    names = [name.partition(":") for name in data.predict_names()]
    assert {tar for tar, _, _ in names} == {f"test/{number:03d}.tar" for number in range(3)}
    assert [member.partition("/")[0] for _, _, member in names] == ["cat"] * 2 + ["dog"] * 3 + ["owl"] * 2


def fit(root: Path | str, num_workers: int = 0, ckpt_path: str | None = None, **options: object) -> Seen:
    data = WebDataset(str(root), batch_size=options.pop("batch_size", 8), num_workers=num_workers, **DISK)  # type: ignore[arg-type]
    model = options.pop("model", None) or Recorder(192, data.num_classes)
    trainer = trainer_for(max_epochs=2, **options)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return model.seen  # type: ignore[attr-defined]


class Stopping(Recorder):
    """Saves a checkpoint amid the second epoch, and ends."""

    def on_train_batch_end(self, *_: object) -> None:
        if len(self.seen) == 5:
            self.trainer.save_checkpoint("amid.ckpt")
            self.trainer.should_stop = True


def test_a_run_resumed_within_an_epoch_sees_what_an_uninterrupted_one_sees(folder, root):
    whole = fit(root)
    assert [step[:2] for step in whole] == [(epoch, batch) for epoch in range(2) for batch in range(3)]
    begun = fit(root, model=Stopping(192, 3), min_epochs=0)
    assert begun == whole[:5]
    again = pack(folder, root.parent / "again", tars=2, seed=1)
    assert fit(again, num_workers=2, ckpt_path="amid.ckpt") == whole[5:], "with other workers, and packed anew"
    assert fit(root, num_workers=1, ckpt_path="amid.ckpt") == whole[5:]


class Writer(Recorder):
    """Leaves what each process saw in a folder."""

    def on_train_end(self) -> None:
        torch.save(self.seen, f"{self.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_index_once_and_train_on_the_batches_of_one(root):
    whole = fit(root)
    for index in root.rglob("*.index"):
        index.unlink()
    fit(root, batch_size=4, model=Writer(192, 3), devices=2, strategy="ddp_spawn")
    for step, first, second in zip(whole, *(torch.load(f"{rank}.pt") for rank in range(2)), strict=True):
        assert step[:2] == first[:2] == second[:2]
        assert step[2] == [label for dealt in zip(first[2], second[2], strict=True) for label in dealt]
        assert step[3] == pytest.approx(first[3] + second[3])


def test_the_configuration_of_imagenet_runs_from_tars(root, monkeypatch):
    (root / "test").rename(root / "val")
    configs = Path(__file__).parents[2] / "configs"
    files = [f"--config={configs / name}.yaml" for name in ("imagenet_resnet18_progressive", "debug")]
    data = ["--data=WebDataset", f"--data.root={root}", "--data.num_classes=3", "--data.image_size=32"]
    data += ["--data.train=train/{000..002}.tar", "--data.batch_size=4", "--data.num_workers=0"]
    rest = ["--model.widths=[2,2,2,4,4]", "--model.compile=false", "--trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "argv", ["pcnn_lightning"])
    cli = main(["fit", *files, *data, *rest, "--trainer.enable_model_summary=false"])
    assert cli.trainer.global_step == 1
    assert len(cli.datamodule.train_set) == 33
    assert cli.model.hparams["num_classes"] == 3


# --- which tars, labels and classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{11..09}", ["11", "10", "09"]),
        ("{a,b}/{1..2}.tar", ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]),
        ("one.tar", ["one.tar"]),
    ],
)
def test_braces_are_expanded_as_by_a_shell(pattern, expected):
    assert expand(pattern) == expected
    shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
    assert shell.stdout.split() == expected


@pytest.mark.parametrize(
    "train", ["train/{000..002}.tar", "train", "train/*.tar", ["train/00{0,2}.tar", "train/001.tar"], "{}/train"]
)
def test_tars_are_named_by_patterns(root, train):
    expected = WebDataset(str(root), **DISK)
    train = train.format(root) if train == "{}/train" else train
    data = WebDataset(str(root), train=train, val="test/000.tar", **DISK)
    assert torch.equal(data.train_set.labels.bincount(), torch.tensor([14, 9, 10]))
    assert len(data.val_set) == 3
    assert len(data.test_set) == len(expected.test_set)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            "train/{002..003}.tar",
            r"train/003\.tar does not lead to images: expected a file, or a folder or pattern of",
        ),
        ("train/x*.tar", r"train/x\*\.tar does not lead to images"),
        (["train", "train/001.tar"], r"train/001\.tar must be named once"),
        (["train", "train/../train/001.tar"], r"train/001\.tar must be named once"),
        ("train/{000,{001,002}}.tar", "must have pairs of braces, and none within another"),
    ],
)
def test_patterns_that_lead_nowhere_or_twice_to_a_tar(root, train, message):
    with pytest.raises(InputError, match=message):
        WebDataset(str(root), train=train)


def test_a_pattern_passes_over_what_lies_beside_the_tars(root):
    """The indexes, which are there from the second time on, and what macOS writes."""
    (root / "train/._000.tar").write_bytes(b"not a tar")
    for _ in range(2):
        data = WebDataset(str(root), train="train/*", **DISK)
        assert len(data.train_set) == len(WebDataset(str(root), **DISK).train_set)


def test_classes_without_images_are_asked_for(root):
    with tarfile.open(root / "train/001.tar", "a") as tar:
        for name, content in (("z.jpg", jpeg(root.parent)), ("z.cls", b"7")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    message = r"has 4 labels up to 7, and no image of label 3: set --data\.num_classes 8"
    with pytest.raises(InputError, match=message):
        WebDataset(str(root))
    assert WebDataset(str(root), num_classes=8, **DISK).class_counts[7] == 1


def test_without_tars(tmp_path):
    with pytest.raises(InputError, match=r"nowhere has no folder train, val or test: expected .*/train/<name>\.tar"):
        WebDataset(str(tmp_path / "nowhere"))
    data = WebDataset(str(tmp_path / "nowhere"), num_classes=5, image_size=24)
    assert (data.num_classes, data.image_shape) == (5, (3, 24, 24))
    with pytest.raises(InputError, match="has no folder train"):
        data.prepare_data()


def test_labels_of_text_and_json(tmp_path):
    image = jpeg(tmp_path)
    members: dict[str, bytes | str] = {"a.JPG": image, "a.cls": " 3\n", "a.json": '{"label": 9}'}
    members |= {"b.png": image, "b.json": '{"cls": 1, "text": "é"}', "b.txt": "caption", "._b.png": "no image"}
    members |= {
        "c.json": '{"label": 0, "cls": 5}',
        "c.jpeg": image,
        "d/é.v2.webp": image,
        "d/é.webp": image,
        "d/é.cls": "2",
    }
    index = scan(str(make_tar(tmp_path / "a.tar", members)))
    assert dict(zip(index.names.tolist(), index.labels.tolist(), strict=True)) == {
        b"a.JPG": 3,
        b"b.png": 1,
        b"c.jpeg": 0,
        "d/é.webp".encode(): 2,
    }
    content = (tmp_path / "a.tar").read_bytes()
    assert all(content[start : start + size] == image for start, size in zip(index.offsets, index.sizes, strict=True))


def test_names_of_classes(root):
    assert WebDataset(str(root), classes=["x", "y", "z"]).classes == ["x", "y", "z"]
    (root / "classes.txt").write_text("Katze\nHund\nEule é\n", encoding="utf-8")
    assert WebDataset(str(root)).classes == ["Katze", "Hund", "Eule é"]
    with pytest.raises(InputError, match=r"num_classes is 2, but .*classes\.txt has 3: set --data\.num_classes 3"):
        WebDataset(str(root), num_classes=2)
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfKatze\nHund\nEule")
    assert WebDataset(str(root)).classes == ["Katze", "Hund", "Eule"]
    (root / "classes.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(InputError, match=r"classes\.txt must be UTF-8 text"):
        WebDataset(str(root))
    (root / "classes.txt").write_text("a\na\n")
    with pytest.raises(InputError, match=r"classes\.txt must have a different name in each line"):
        WebDataset(str(root))
    with pytest.raises(InputError, match="label 2; allowed are 0 to 1"):
        WebDataset(str(root), num_classes=None, classes=["a", "b"], **DISK).setup("fit")


# --- what can be wrong with a tar -----------------------------------------------------------------------------------

GOOD = {"a.jpg": b"x" * 700, "a.cls": "0"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x"}, r"t\.tar: a\.jpg has no label: expected a member a\.cls or a\.json beside it"),
        (
            {"a.jpg": b"x", "a.cls": "cat"},
            r"t\.tar: the label in a\.cls must be an integer of at least 0, .* got 'cat'",
        ),
        ({"a.jpg": b"x", "a.cls": "-1"}, r"the label in a\.cls must be .* got '-1'"),
        ({"a.jpg": b"x", "a.json": '{"label": "cat"}'}, r"in a\.json must be .* under the name label or cls, .* 'cat'"),
        ({"a.jpg": b"x", "a.json": '{"class": 1}'}, r"in a\.json must be .* under the name label or cls"),
        ({"a.jpg": b"x", "a.json": "{"}, r"in a\.json must be"),
        ({"a.jpg": b"x", "a.json": '{"label": true}'}, r"in a\.json must be .* 'True'"),
        ({**GOOD, "a.png": b"x"}, r"t\.tar has two images of the key a: a\.jpg and a\.png"),
        ({**GOOD, "a.CLS": "1"}, r"t\.tar has two labels of the key a: a\.cls and a\.CLS"),
        ({**GOOD, "./a.jpg": b"x"}, r"t\.tar has two images of the key a: a\.jpg and a\.jpg"),
        ({**GOOD, "b.cls": "0"}, r"t\.tar: b\.cls is a label without an image"),
        (
            {**GOOD, "v1.5.png": b"x", "v1.cls": "0"},
            r"v1\.5\.png has a dot before its extension, but a key ends",
        ),
        ({"a.jpg": b"x", "a.cls": "1_0"}, r"in a\.cls must be .* got '1_0'"),
        ({"a.jpg": b"x", "a.json": "[" * 20_000}, r"in a\.json must be"),
        ({"a.txt": "x"}, r"t\.tar holds no images: expected members ending in .*\.jpeg, .*\.png, .*\.webp"),
    ],
)
def test_members_that_are_wrong_are_named(tmp_path, members, message):
    make_tar(tmp_path / "train/t.tar", members)
    with pytest.raises(InputError, match=message) as caught:
        WebDataset(str(tmp_path), num_classes=1).prepare_data()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tmp_path, kind):
    path = make_tar(tmp_path / "train/t.tar", GOOD)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = kind, "a.jpg"
        tar.addfile(link)
    with pytest.raises(InputError, match=r"t\.tar: b\.jpg is a link, so that it cannot be read in place"):
        scan(str(path))


def test_links_and_sparse_members_that_are_no_images_are_passed_over(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.cls").write_text("0")
    (tmp_path / "a.seg.png").symlink_to("a.jpg")
    with (tmp_path / "a.npy").open("wb") as file:
        file.truncate(1_000_000)
    subprocess.run(["tar", "-S", "-cf", "t.tar", "a.jpg", "a.cls", "a.seg.png", "a.npy"], cwd=tmp_path, check=True)
    assert scan(str(tmp_path / "t.tar")).names.tolist() == [b"a.jpg"]


def test_sparse_members_are_refused(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.seek(1_000_000)
        file.write(b"x")
    (tmp_path / "a.cls").write_text("0")
    subprocess.run(["tar", "-S", "-cf", "t.tar", "a.jpg", "a.cls"], cwd=tmp_path, check=True)
    with pytest.raises(InputError, match=r"t\.tar: a\.jpg is sparse, so that it cannot be read in place"):
        scan(str(tmp_path / "t.tar"))


def test_tars_of_a_current_folder_are_those_of_its_contents(root, tmp_path):
    """As ``tar -cf x.tar .`` writes them, with ``./`` before each name, and entries of folders."""
    (tmp_path / "plain").mkdir()
    with tarfile.open(root / "train/000.tar") as tar:
        tar.extractall(tmp_path / "plain", filter="data")
    subprocess.run(["tar", "-cf", "../dotted.tar", "."], cwd=tmp_path / "plain", check=True)
    expected, found = scan(str(root / "train/000.tar")), scan(str(tmp_path / "dotted.tar"))
    label_of = [dict(zip(index.names.tolist(), index.labels.tolist(), strict=True)) for index in (expected, found)]
    assert label_of[0] == label_of[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (gzip.compress, r"t\.tar is compressed by gzip, so .*: unpack it"),
        (lambda content: content[:3200], r"t\.tar is truncated within its member b\.jpg"),
        (lambda content: content[:2560], r"t\.tar is truncated, or damaged, after its member a\.cls"),
        (lambda content: content[:2800], r"t\.tar is truncated, or damaged, after its member a\.cls"),
        (lambda content: content[:2560] + b"x" * 4096, r"t\.tar is truncated, or damaged, after its member a\.cls"),
        (lambda content: content * 2, r"t\.tar goes on after its end, as if several were joined: .* join by tar -A"),
        (lambda _: b"no tar" * 500, r"t\.tar cannot be read as a tar"),
        (lambda _: b"", r"t\.tar cannot be read as a tar"),
    ],
)
def test_tars_that_are_damaged_are_named(tmp_path, damage, message):
    tar = make_tar(tmp_path / "train/t.tar", {**GOOD, "b.jpg": b"x" * 700, "b.cls": "0"})
    tar.write_bytes(damage(tar.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        WebDataset(str(tmp_path), num_classes=1).prepare_data()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.index"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_or_left_out(tmp_path, num_workers):
    image = jpeg(tmp_path)
    members: dict[str, bytes | str] = {f"{key}.cls": "0" for key in "abcdef"}
    make_tar(
        tmp_path / "train/t.tar", members | {f"{key}.jpg": image[:-200] if key == "c" else image for key in "abcdef"}
    )
    options = {"num_workers": num_workers, "batch_size": 2, "val_fraction": 0, **DISK}
    with pytest.raises(InputError, match=r"train/t\.tar:c\.jpg cannot be read as an image: Truncated"):
        list(WebDataset(str(tmp_path), **options).train_dataloader())
    data = WebDataset(str(tmp_path), skip_corrupt=True, **options)
    assert len(data.train_set) == 5
    assert data.state_dict()["left_out"] == [f"c.jpg of {len(image) - 200} bytes"]
    assert len(list(data.train_dataloader())) == 2


def test_what_is_left_out_is_known_again_in_other_tars(folder, tmp_path):
    """A run goes on with tars packed anew, and with a class that has no images in any split."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    for name in ("cat/000.png", "cat/005.png", "owl/003.png", "owl/004.png"):
        for file in (damaged / "train").glob(f"{name.removesuffix('png')}*"):
            file.write_bytes(file.read_bytes()[:-40])
    first, second = (pack(damaged, tmp_path / f"packed-{seed}", tars=4, seed=seed) for seed in range(2))
    options = {"num_classes": 4, "skip_corrupt": True, "batch_size": 4, "val_fraction": 0.2, **DISK}
    before, after = WebDataset(str(first), **options), WebDataset(str(second), **options)
    expected = batches(before)
    assert len(before.state_dict()["left_out"]) == 4
    assert same(batches(after), expected)
    assert after.state_dict()["left_out"] == before.state_dict()["left_out"]


def test_what_is_left_out_is_not_taken_for_another_image_of_its_name(tmp_path):
    rng, left_out = np.random.default_rng(0), []
    images = []
    for number in range(6):
        random_image(rng, 20 + number).save(tmp_path / "one.jpg")
        images.append((tmp_path / "one.jpg").read_bytes())
    for damaged in (0, 3):
        for label in range(2):
            members: dict[str, bytes | str] = {f"{number}.cls": str(label) for number in range(3)}
            for number in range(3):
                image = images[3 * label + number]
                members[f"{number}.jpg"] = image[:-30] if 3 * label + number == damaged else image
            make_tar(tmp_path / f"{damaged}/train/{label}.tar", members)
        data = WebDataset(str(tmp_path / str(damaged)), skip_corrupt=True, val_fraction=0, **DISK)
        assert len(data.train_set) == 5
        left_out.append(data.state_dict()["left_out"])
    assert left_out[0] != left_out[1]


# --- the index ------------------------------------------------------------------------------------------------------


def scans(monkeypatch) -> list[str]:
    seen: list[str] = []

    def counted(tar: str) -> tars.Index:
        seen.append(tar)
        return scan(tar)

    monkeypatch.setattr(tars, "scan", counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # in this process, which counts
    return seen


def test_a_tar_is_scanned_once_and_again_when_it_has_changed(folder, root, monkeypatch):
    seen = scans(monkeypatch)
    expected = batches(WebDataset(str(root), batch_size=4, **DISK))
    assert len(seen) == 6
    assert same(batches(WebDataset(str(root), batch_size=4, **DISK)), expected)
    assert len(seen) == 6
    changed = root / "train/001.tar"
    before = changed.stat()
    content = changed.read_bytes()
    changed.write_bytes(content)
    os.utime(changed, ns=(0, before.st_mtime_ns + 1))
    assert same(batches(WebDataset(str(root), batch_size=4, **DISK)), expected)
    assert seen[6:] == [str(changed)]
    for damaged in (b"", b"no index", (root / "train/000.tar.index").read_bytes()[:-9]):
        (root / "train/000.tar.index").write_bytes(damaged)
        assert same(batches(WebDataset(str(root), batch_size=4, **DISK)), expected)
    assert len(seen) == 10


def test_a_tar_that_has_changed_since_is_not_read(root):
    files, _ = in_order(read_indexes([str(root / "test/000.tar")]))
    os.utime(root / "test/000.tar", ns=(0, 5))
    message = r"test/000\.tar:\w+/.* the tar has changed since it was indexed: start the run again$"
    with pytest.raises(InputError, match=message):
        decode(files, 0)


def test_a_tar_that_changes_while_it_is_open_is_not_read_on(root):
    files, _ = in_order(read_indexes([str(root / "test/000.tar")]))
    decode(files, 0)
    with (root / "test/000.tar").open("r+b") as tar:
        tar.write(b"x" * 100)
    with pytest.raises(InputError, match="the tar has changed since it was indexed"):
        decode(files, 0)


@pytest.mark.parametrize("given", [True, False])
def test_indexes_of_a_read_only_folder_are_kept_elsewhere(root, tmp_path, monkeypatch, given):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for tar in root.rglob("*.tar"):
        tar.with_name(f"{tar.name}.index").write_bytes(b"outdated")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    options = {**DISK, "cache_dir": str(cache / "own")} if given else DISK
    expected = batches(WebDataset(str(root), batch_size=4, **options))
    assert {index.read_bytes() for index in root.rglob("*.index")} == {b"outdated"}
    assert len(list((cache / ("own" if given else "pcnn_lightning")).rglob("*.index"))) == 6
    seen = scans(monkeypatch)
    assert same(batches(WebDataset(str(root), batch_size=4, **options)), expected)
    assert seen == []


INDEXING = """
import sys
import time
from pcnn_lightning.data import WebDataset, tars
write_whole = tars.write_whole
tars.write_whole = lambda *given: (time.sleep(0.05), write_whole(*given), print("written", flush=True))
WebDataset(sys.argv[1], num_classes=3, cache_dir=sys.argv[2]).prepare_data()
"""


@pytest.mark.slow
def test_killed_while_indexing_it_leaves_whole_indexes_and_no_processes(root, tmp_path):
    tar = (root / "train/000.tar").read_bytes()
    for number in range(60):
        (root / f"train/more-{number}.tar").write_bytes(tar)
    command = [sys.executable, "-c", INDEXING, str(root), str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        limit = time.monotonic() + 30
        while process_group_is_alive(process.pid):  # workers look for their parent every few seconds
            assert time.monotonic() < limit, "workers are left"
            time.sleep(0.2)
    found = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    whole = [path for path in found if path.name.endswith(".index")]
    assert 0 < len(whole) < 66
    for path in whole:
        assert tars.safe_open(path, "numpy").metadata()["format"] == tars.FORMAT
    data = WebDataset(str(root), num_classes=3, cache_dir=str(tmp_path / "cache"), **DISK)
    data.prepare_data()
    assert not list((tmp_path / "cache").rglob("*.part"))
    assert len(data.train_set) > 600


def process_group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
