"""Where the images of a folder are found."""

from pathlib import Path

import pytest

from pcnn_lightning.data.layout import image_files
from pcnn_lightning.errors import InputError


def test_image_files_are_found_sorted_at_any_depth_and_others_passed_over(tmp_path):
    wanted = ["Größe 1.JPG", "a/b/c.png", "z.Tiff"]
    others = [".hidden.png", "._z.png", ".thumbnails/t.png", "Thumbs.db", ".DS_Store", "notes.txt", "png"]
    for name in wanted + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert image_files(tmp_path) == [str(tmp_path / name) for name in wanted]


def make_images(root, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_links_to_files_and_folders_are_followed(tmp_path):
    make_images(tmp_path, "class/0.png", "elsewhere/1.png", "elsewhere/deep/2.png")
    (tmp_path / "class/file.png").symlink_to(tmp_path / "elsewhere/1.png")
    (tmp_path / "class/folder").symlink_to("../elsewhere")
    (tmp_path / "class/.hidden").symlink_to("../elsewhere")
    (tmp_path / "class/dead").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("class")
    for name in ("class", "link"):
        found = ["0.png", "file.png", "folder/1.png", "folder/deep/2.png"]
        assert image_files(tmp_path / name) == [str(tmp_path / name / file) for file in found]


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "deep", "deep/../../../root"])
def test_a_link_to_a_folder_around_it_is_passed_over(tmp_path, monkeypatch, target):
    make_images(tmp_path, "root/class/deep/0.png")
    monkeypatch.chdir(tmp_path / "root")
    place = "class/deep" if target == "deep" else "class"
    Path(place, "link").symlink_to(tmp_path / "root/class/deep" if target == "deep" else target)
    for folder in (tmp_path / "root/class", Path("class"), Path("../root/class")):
        assert image_files(folder) == [str(folder / "deep/0.png")]


def test_links_that_lead_round_in_a_circle_end(tmp_path):
    make_images(tmp_path, "a/0.png", "b/inner/1.png", "c/2.png")
    (tmp_path / "a/to b").symlink_to("../b/inner")
    (tmp_path / "b/inner/to c").symlink_to("../../c")
    (tmp_path / "c/to a").symlink_to("../a")
    (tmp_path / "c/to b").symlink_to("../b")  # holds b/inner, which was passed on the way
    found = ["0.png", "to b/1.png", "to b/to c/2.png"]
    assert image_files(tmp_path / "a") == [str(tmp_path / "a" / file) for file in found]


def test_the_working_folder_is_not_on_the_way_to_a_folder_beside_it(tmp_path, monkeypatch):
    make_images(tmp_path, "class/0.png", "here/1.png")
    (tmp_path / "class/more").symlink_to("../here")
    monkeypatch.chdir(tmp_path / "here")
    assert image_files(Path("../class")) == ["../class/0.png", "../class/more/1.png"]


def test_folders_without_images_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("")
    with pytest.raises(InputError, match=r"empty holds no images: expected files ending in \.jpg"):
        image_files(tmp_path / "empty")
    with pytest.raises(InputError, match="nowhere cannot be read as a folder: No such file"):
        image_files(tmp_path / "nowhere")
