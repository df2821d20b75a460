"""Images, and folders and tars of them, made for a test."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def random_image(rng: np.random.Generator, width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_folder(root: Path, counts: dict[str, dict[str, int]], size: tuple[int, int] = (8, 8)) -> Path:
    """Write ``counts[split][class]`` random PNGs of ``size`` (W, H) below ``root``."""
    rng = np.random.default_rng(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                random_image(rng, *size).save(folder / f"{number:03d}.png")
    return root


def make_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """Write a tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member, data = tarfile.TarInfo(name), content.encode() if isinstance(content, str) else content
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pack(folder: Path, root: Path, tars: int = 3, seed: int = 0) -> Path:
    """Deal the images of a folder, ``folder/split/class``, out at random to tars of each split, ``root/split``."""
    rng = np.random.default_rng(seed)
    for split in folder.iterdir():
        classes = sorted(one.name for one in split.iterdir())
        files = sorted(split.glob("*/*"))
        for tar, chosen in enumerate(np.array_split(rng.permutation(len(files)), tars)):
            members: dict[str, bytes | str] = {}
            for file in (files[index] for index in chosen):
                key = f"{file.parent.name}/{file.name.partition('.')[0]}"
                members[f"{key}.cls"] = str(classes.index(file.parent.name))
                members[f"{key}{file.suffix}"] = file.read_bytes()
            make_tar(root / split.name / f"{tar:03d}.tar", members)
    return root
