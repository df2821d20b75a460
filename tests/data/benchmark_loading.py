"""Images a second, from folders and tars, beside other loaders; not a test.

    python tests/data/benchmark_loading.py DIR

writes 20,000 photograph-like JPEGs to DIR, unless they are there, and measures all loaders in turns, so that other
programs on the machine slow down all alike. Needs webdataset and simplejpeg beside the package.
"""

import argparse
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from made_images import pack
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from pcnn_lightning.data import ImageFolder, WebDataset, tars
from pcnn_lightning.data.augment import flip
from pcnn_lightning.data.datasets import Augmentation
from pcnn_lightning.data.decode import decode
from pcnn_lightning.data.disk import DiskImages
from pcnn_lightning.data.sources import Files

CLASSES, TARS, BATCH, SIDE = 100, 20, 64, 224
TRANSFORM = v2.Compose([v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
"""Of the other loaders. Like ours, they return bytes, which are normalized on the device."""


# --- the images -----------------------------------------------------------------------------------------------------


def photograph(number: int) -> bytes:
    """A random detail of one of scikit-learn's two photographs in 500×375 pixels, with some noise, as a JPEG."""
    rng = np.random.default_rng(number)
    photographs, noise = sources()
    whole = photographs[number % 2]
    height = int(whole.height * rng.uniform(0.6, 1.0))
    width = height * 4 // 3
    left, top = int(rng.integers(whole.width - width + 1)), int(rng.integers(whole.height - height + 1))
    detail = whole.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
    row, column = rng.integers(noise.shape[0] - 374), rng.integers(noise.shape[1] - 499)
    noisy = np.asarray(detail) * np.float32(rng.uniform(0.7, 1.1)) + noise[row : row + 375, column : column + 500]
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


@cache
def sources() -> tuple[list[Image.Image], Any]:
    """The two photographs, and a field of noise of which each image takes a part, since drawing it takes long."""
    noise = np.random.default_rng(0).normal(0, 3, (750, 1000, 3)).astype(np.float32)
    return [Image.fromarray(image) for image in load_sample_images().images], noise


def write_class(root: Path, count: int, label: int) -> None:
    folder = root / "train" / f"class_{label:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count // CLASSES):
        (folder / f"{number:05d}.jpg").write_bytes(photograph(label * count + number))


def make(root: Path, count: int) -> None:
    if not (root / "tars").is_dir():
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(write_class, root / "folder", count), range(CLASSES)))
        pack(root / "folder", root / "tars.part", TARS)
        (root / "tars.part").rename(root / "tars")


# --- decoding -------------------------------------------------------------------------------------------------------


def decoders(files: list[str]) -> dict[str, Callable[[int], Any]]:
    import simplejpeg

    contents = [Path(file).read_bytes() for file in files]
    crop = v2.RandomResizedCrop(SIDE)
    ours = DiskImages(files=Files(files), size=(SIDE, SIDE), augmentation=Augmentation(0, crop_padding=0, flip=True))

    def drafted(index: int) -> Image.Image:
        image = Image.open(io.BytesIO(contents[index]))
        image.draft("RGB", (SIDE, SIDE))
        return image.convert("RGB")

    def as_tensor(index: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(contents[index]), dtype=torch.uint8)

    return {
        "decode: Pillow": lambda index: np.asarray(Image.open(io.BytesIO(contents[index])).convert("RGB")),
        "decode: Pillow, draft": lambda index: np.asarray(drafted(index)),
        "decode: torchvision": lambda index: decode_jpeg(as_tensor(index), ImageReadMode.RGB),
        "decode: simplejpeg": lambda index: simplejpeg.decode_jpeg(contents[index], "RGB"),
        "decode: ours, from a file": lambda index: decode(ours.files, index),
        "crop: Pillow": lambda index: np.asarray(crop(Image.open(io.BytesIO(contents[index])).convert("RGB"))),
        "crop: Pillow, draft": lambda index: np.asarray(crop(drafted(index))),
        "crop: torchvision": lambda index: crop(decode_jpeg(as_tensor(index), ImageReadMode.RGB)),
        "crop: simplejpeg": lambda index: crop(
            torch.from_numpy(simplejpeg.decode_jpeg(contents[index], "RGB")).permute(2, 0, 1)
        ),
        "crop: ours, from a file": lambda index: ours.__getitems__([index]),
    }


def measure_decoders(root: Path, rounds: int) -> None:
    files = [str(file) for file in sorted((root / "folder").rglob("*.jpg"))[::250]]
    table = decoders(files)
    best = dict.fromkeys(table, float("inf"))
    for _ in range(rounds):
        for name, work in table.items():
            began = time.perf_counter()
            for index in range(len(files)):
                work(index)
            best[name] = min(best[name], (time.perf_counter() - began) / len(files))
    for name, seconds in best.items():
        print(f"{name:28} {seconds * 1000:6.2f} ms")


# --- loading --------------------------------------------------------------------------------------------------------


def loaders(root: Path) -> dict[str, Callable[[int], Iterator[Any]]]:
    import webdataset

    def ours(kind: type[ImageFolder | WebDataset], folder: str, workers: int) -> Iterator[Any]:
        options: dict[str, Any] = {"image_size": SIDE, "in_memory": False, "val_fraction": 0, "batch_size": BATCH}
        for batch in kind(str(root / folder), num_workers=workers, **options).train_dataloader():
            yield flip(batch.images, batch.flips), batch.labels  # flipped on the device, here a CPU

    def torchvisions(workers: int) -> Iterator[Any]:
        images = datasets.ImageFolder(str(root / "folder/train"), TRANSFORM)
        return iter(DataLoader(images, BATCH, shuffle=True, num_workers=workers))

    def webdatasets(workers: int) -> Iterator[Any]:
        paths = [str(path) for path in sorted((root / "tars/train").glob("*.tar"))]
        images = webdataset.WebDataset(paths, shardshuffle=TARS).shuffle(1000).decode("pil")
        images = images.to_tuple("jpg", "cls").map_tuple(TRANSFORM, lambda label: label).batched(BATCH)
        return iter(DataLoader(images, batch_size=None, num_workers=workers))

    return {
        "ImageFolder, ours": lambda workers: ours(ImageFolder, "folder", workers),
        "WebDataset, ours": lambda workers: ours(WebDataset, "tars", workers),
        "ImageFolder of torchvision": torchvisions,
        "webdataset": webdatasets,
    }


def measure_loaders(root: Path, rounds: int, batches: int) -> None:
    table = loaders(root)
    for workers in (0, 1, 2):
        rates: dict[str, list[float]] = {name: [] for name in table}
        for _ in range(rounds):
            for name, start in table.items():
                loading = start(workers)
                list(islice(loading, 1 + 2 * workers))  # what is loaded ahead
                began = time.perf_counter()
                list(islice(loading, batches))
                rates[name].append(batches * BATCH / (time.perf_counter() - began))
                del loading
        for name, found in rates.items():
            spread = f"{min(found):.0f} to {max(found):.0f}"
            print(f"{workers} workers  {name:28} {median(found):6.0f} images/s ({spread})", flush=True)


# --- the index ------------------------------------------------------------------------------------------------------


def memory() -> int:
    """Bytes of memory that belong to this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def measure_index(root: Path) -> None:
    for index in (root / "tars").rglob("*.index"):
        index.unlink()
    for what in ("made", "read"):
        began = time.perf_counter()
        data = WebDataset(str(root / "tars"), num_classes=CLASSES)
        data.prepare_data()
        size = sum(path.stat().st_size for path in (root / "tars").rglob("*.tar"))
        files, _ = data.find_files()["train"]
        seconds = time.perf_counter() - began
        print(f"index of {len(files):,} images ({size / 1e9:.1f} GB, {os.cpu_count()} cores) {what}: {seconds:.2f} s")


def measure_large_index(root: Path, count: int = 1_300_000, shards: int = 147) -> None:
    """As large as ImageNet's: tars without content, whose scans are made up."""
    folder = root / "large/train"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def made_up(tar: str) -> tars.Index:
        size = count // shards
        labels = rng.integers(0, 1000, size)
        numbers = zip(labels.tolist(), rng.integers(0, 10**8, size).tolist(), strict=True)
        names = np.array([b"n%08d/n%08d_%d.JPEG" % (label, label, number) for label, number in numbers])
        return tars.Index(labels, np.arange(size) * 110_000, np.full(size, 110_000), names, tars.stamp_of(tar))

    paths = [folder / f"{number:03d}.tar" for number in range(shards)]
    for path in paths:
        path.touch()
    tars.scan, scan = made_up, tars.scan
    tars.read_indexes([str(path) for path in paths])
    tars.scan = scan
    before, began = memory(), time.perf_counter()
    files, labels = tars.in_order(tars.read_indexes([str(path) for path in paths]))
    held = sum(array.nbytes for array in (files.owners, files.offsets, files.sizes, files.names)) + labels.nbytes
    seconds, grown = time.perf_counter() - began, memory() - before
    kept = sum(path.stat().st_size for path in folder.glob("*.index"))
    print(
        f"index of {len(files):,} images read and sorted: {seconds:.2f} s, {held / 1e6:.0f} MB held "
        f"({grown / 1e6:.0f} MB more memory taken), {kept / 1e6:.0f} MB of files"
    )


def check_equal(root: Path) -> None:
    options = {"image_size": SIDE, "in_memory": False, "val_fraction": 0, "batch_size": BATCH}
    loading = [iter(kind(str(root / where), **options).train_dataloader()) for kind, where in KINDS]
    for one, other in islice(zip(*loading, strict=True), 4):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    print("batches from the folder and from the tars are equal")


KINDS: list[tuple[Any, str]] = [(ImageFolder, "folder"), (WebDataset, "tars")]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    make(given.root, given.images)
    if given.rounds > 0:
        check_equal(given.root)
        measure_index(given.root)
        measure_large_index(given.root)
        measure_decoders(given.root, given.rounds)
        measure_loaders(given.root, given.rounds, given.batches)
