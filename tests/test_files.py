"""Files are written whole or not at all."""

import multiprocessing
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole


def write_often(path: Path, letter: bytes) -> None:
    for _ in range(30):
        write_whole(path, 1_000_000 * letter)


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "last.ckpt"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(path, letter)) for letter in (b"A", b"B")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert path.read_bytes() in (1_000_000 * b"A", 1_000_000 * b"B")
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    left = tmp_path / f"last.ckpt.{host}-{dead.pid}-0123abcd.part"
    others = [
        tmp_path / f"last.ckpt.{host}-{os.getppid()}-0123abcd.part",
        tmp_path / f"last.ckpt.elsewhere-{dead.pid}-0123abcd.part",
        tmp_path / f"best.ckpt.{host}-{dead.pid}-0123abcd.part",
    ]
    for file in (left, *others):
        file.touch()
    write_whole(tmp_path / "last.ckpt", b"new")
    assert set(tmp_path.iterdir()) == {tmp_path / "last.ckpt", *others}


def test_a_full_disk_leaves_the_previous_file(tmp_path):
    path = tmp_path / "last.ckpt"
    write_whole(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"last\.ckpt cannot be written \(File too large\)"):
            write_whole(path, 2000 * b"x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_symbolic_link_stays_one(tmp_path):
    link, file = tmp_path / "link", tmp_path / "folder" / "file"
    link.symlink_to(file)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert file.read_bytes() == b"new"


def test_a_pipe_is_written_to(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"content")
    reader.join()
    assert read == [b"content"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"\(Is a directory\)"):
        write_whole(tmp_path, b"content")
    assert not list(tmp_path.parent.glob("*.part"))


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "ordinary").touch()
    write_whole(tmp_path / "whole", b"content")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
