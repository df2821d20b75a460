"""Parquet files, against the folder of the same images."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from made_images import make_folder
from pyarrow import parquet as pq
from test_webdataset import DISK, batches, same

from pcnn_lightning.data import ImageFolder, ParquetImages
from pcnn_lightning.errors import InputError

COUNTS = {"train": {"cat": 14, "dog": 19}, "test": {"cat": 2, "dog": 3}}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder", COUNTS, size=(20, 14))


def write(folder: Path, root: Path, flat: bool = False, names: list[str] | None = None) -> Path:
    """The files of ``folder``, in its order, in two Parquet files for training and one to test."""
    root.mkdir(exist_ok=True)
    for split, parts in (("train", 2), ("test", 1)):
        files = sorted((folder / split).glob("*/*"))
        length = -(-len(files) // parts)
        for part in range(parts):
            chosen = files[part * length : (part + 1) * length]
            contents = [file.read_bytes() for file in chosen]
            images: list[Any] = contents if flat else [{"bytes": one, "path": None} for one in contents]
            table = pa.table({"image": images, "label": [int(file.parent.name == "dog") for file in chosen]})
            if names:
                features = {"label": {"names": names, "_type": "ClassLabel"}}
                table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
            pq.write_table(table, root / f"{split}-{part}.parquet", row_group_size=5)
    return root


SPLITS = {"train": "train-{0..1}.parquet", "test": "test-*.parquet"}


@pytest.mark.parametrize("flat", [True, False])
def test_batches_are_those_of_the_folder(folder, tmp_path, flat):
    expected = batches(ImageFolder(str(folder), batch_size=4, **DISK))
    root = write(folder, tmp_path / "root", flat)
    data = ParquetImages(str(root), **SPLITS, batch_size=4, **DISK)
    assert data.classes == ["0", "1"]
    assert not list(root.glob("*.tar")), "nothing is copied before it is needed"
    assert same(batches(data), expected)
    assert data.predict_names()[0].endswith(".tar:test-0.parquet/00000000.png")
    made = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    assert len(list(root.glob("*.tar"))) == 3
    assert same(batches(ParquetImages(str(root), **SPLITS, batch_size=4, num_workers=2, **DISK)), expected)
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == made, "the copies are used again"


def test_a_changed_file_is_copied_anew(folder, tmp_path):
    root = write(folder, tmp_path / "root")
    given = {**SPLITS, "num_classes": 2, "cache_dir": str(tmp_path / "cache"), **DISK}
    assert len(ParquetImages(str(root), **given).test_set) == 5
    shutil.copy(root / "train-0.parquet", root / "test-0.parquet")
    assert len(ParquetImages(str(root), **given).test_set) == 17
    assert not list(root.glob("*.tar"))


def test_names_of_classes_are_those_of_the_datasets_library(folder, tmp_path):
    root = write(folder, tmp_path / "root", names=["Katze", "Hund"])
    assert ParquetImages(str(root), **SPLITS).classes == ["Katze", "Hund"]
    assert ParquetImages(str(root), **SPLITS, classes=["a", "b"]).classes == ["a", "b"]
    with pytest.raises(InputError, match=r"num_classes is 3, but .*train-0\.parquet has 2: set --data\.num_classes 2"):
        ParquetImages(str(root), **SPLITS, num_classes=3)
    assert ParquetImages(str(tmp_path / "nowhere"), num_classes=7).num_classes == 7


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": [b"x"], "label": [None]}, {}, r"a\.parquet: row 0 must have the bytes .*, but has bytes and None$"),
        (
            {"image": [b"x", None], "label": [0, 0]},
            {},
            r"row 1 must have the bytes of an image in image .* NoneType and 0$",
        ),
        ({"image": [b"x"], "label": [-1]}, {}, r"row 0 must have .* an integer of at least 0 in label, .* and -1$"),
        ({"image": [b"x"], "label": [0.5]}, {}, r"row 0 must have .* and 0\.5$"),
        ({"image": [b"x"], "label": [[0]]}, {"num_classes": None}, r"row 0 must have .* and \[0\]$"),
        ({"image": [{"path": "x"}], "label": [0]}, {}, r"row 0 must have the bytes of an image in image"),
        ({"img": [b"x"], "label": [0]}, {}, r"no column image: set --data\.image_column to one of img, label$"),
        ({"img": [b"x"], "fine": [0]}, {"image_column": "img"}, r"no column label: set --data\.label_column to one of"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, columns, options, message):
    (tmp_path / "train").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "train/a.parquet")
    with pytest.raises(InputError, match=message) as caught:
        ParquetImages(str(tmp_path), **{"num_classes": 1, **options}).prepare_data()
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.parquet"], "nothing half is left"


def test_damaged_files_a_full_disk_and_a_missing_library_are_named(folder, tmp_path, monkeypatch):
    root = write(folder, tmp_path / "root")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"3 Parquet files take .* but 1\.0 kB are free in .*: set --data\.cache_dir"):
        ParquetImages(str(root), **SPLITS).prepare_data()
    monkeypatch.undo()
    content = bytearray((root / "train-1.parquet").read_bytes())
    content[100:2000] = bytes(1900)
    (root / "train-1.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"train-1\.parquet cannot be copied to .*\.tar: ") as caught:
        ParquetImages(str(root), **SPLITS, num_classes=2).prepare_data()
    assert "\n" not in str(caught.value)
    (root / "train-1.parquet").write_bytes(content[:500])
    with pytest.raises(InputError, match=r"train-1\.parquet cannot be read as a Parquet file: "):
        ParquetImages(str(root), **SPLITS, num_classes=2).prepare_data()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"Parquet files need pyarrow: pip install '\.\[parquet\]'"):
        ParquetImages(str(root), **SPLITS)


def test_formats_are_told_by_content(tmp_path):
    images = {".png": b"\x89PNG\r\n", ".webp": b"RIFF1234WEBP", ".jpg": b"\xff\xd8"}
    (tmp_path / "test").mkdir()
    pq.write_table(pa.table({"image": list(images.values()), "label": [0, 0, 0]}), tmp_path / "test/a.parquet")
    files, labels = ParquetImages(str(tmp_path), num_classes=1).find_files()["test"]
    assert [Path(files.name(index)).suffix for index in range(3)] == list(images)
    assert [files.open(index).read() for index in range(3)] == list(images.values())
    assert torch.equal(labels, torch.zeros(3, dtype=torch.long))
