"""Images and image folders made for a test."""

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
