"""What lies in a folder of images: how it is laid out, how many classes and images, and how large they are."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import BinaryIO, TypeVar

from PIL import Image

from ghostmask.data_pipelines.photographs.places import Place
from ghostmask.data_pipelines.photographs.val_labels import DEVKIT
from ghostmask.data_pipelines.sources.imagefolder import class_folders, images_below
from ghostmask.data_pipelines.sources.webdataset import samples, shards_of
from ghostmask.engine.errors import InputError, bad_value

Thing = TypeVar("Thing")

SAMPLE = 200
"""Images that are opened, spread evenly over the classes."""
CIFAR = {"cifar-10-batches-py": ("cifar10", 10), "cifar-100-python": ("cifar100", 100)}
"""Folder, as the dataset unpacks -> its name here, its classes."""
IMAGENET_TAR = "ILSVRC2012_img_train.tar"


@dataclass(frozen=True)
class Images:
    """dataset: its name here; root: for data.root; num_train: training images, reckoned where that is said in `notes`;
    fewest, most: images of the smallest and the largest class; side: median shorter side in pixels; pixels: mean number
    of an image's; split: whether there are images for evaluation."""

    dataset: str
    root: Path
    num_classes: int
    num_train: int
    fewest: int
    most: int
    side: int
    pixels: float
    split: bool = True
    notes: tuple[str, ...] = ()
    labels: Path | None = None
    """Of evaluation images that lie in no class folders."""


def look(folder: Path) -> Images:
    """Raises InputError where the folder holds nothing that can be trained on."""
    if not folder.is_dir():
        raise bad_value("FOLDER", str(folder), "is no folder")
    for name, (dataset, classes) in CIFAR.items():
        if (folder / name).is_dir():
            return Images(dataset, folder, classes, 50_000, 50_000 // classes, 50_000 // classes, 32, 1024.0)
    if (folder / IMAGENET_TAR).is_file():
        note = "the tar files as downloaded; sizes and numbers are ImageNet's, nothing was unpacked to look"
        return Images("imagenet", folder, 1000, 1_281_167, 732, 1300, 375, 470.0 * 390, notes=(note,))
    shards = shards_of(folder, "train")
    if shards and not class_folders(folder / "train"):  # beside which a train.tar is what they were unpacked from
        return _shards(folder, shards)
    return _folders(folder)


def _folders(folder: Path) -> Images:
    """Class folders, in train/ or in the folder itself."""
    root = folder.parent if folder.name == "train" and (folder.parent / "val").is_dir() else folder
    train = root / "train" if (root / "train").is_dir() else root
    classes = {name: list(images_below(train / name, [])) for name in class_folders(train)}
    empty = [name for name, images in classes.items() if not images]
    if not any(classes.values()):
        raise bad_value("FOLDER", str(folder), "holds no class folders with images, such as train/CLASS/*.jpg")
    if empty:
        raise InputError(f"FOLDER = {str(folder)!r}: no image in class folder {empty[0]}; remove it, or fill it")
    if len(classes) == 1:
        raise bad_value(
            "FOLDER", str(folder), f"{train} holds one class folder, {next(iter(classes))}; give a folder further down"
        )
    val = class_folders(root / "val")
    labels = _labels(root) if (root / "val").is_dir() and not set(val) & set(classes) else None
    if (root / "val").is_dir() and not labels and val != list(classes):
        odd = sorted(set(val) ^ set(classes))[:3]
        raise bad_value("FOLDER", str(folder), f"train and val must have the same class folders; they differ in {odd}")
    paths = [path for images in classes.values() for path in images]
    sizes, broken = _sizes(_spread(paths), paths[0])
    counts = [len(images) for images in classes.values()]
    return Images(
        "imagefolder", root, len(classes), sum(counts), min(counts), max(counts), *_middle(sizes), bool(val or labels),
        tuple(_said(broken)), labels,
    )  # fmt: skip


def _labels(root: Path) -> Path | None:
    """A file in the folder of the evaluation images, or above it, that says what they are; None without one."""
    there = [path for folder in (root / "val", root) for path in sorted(folder.iterdir()) if path.is_file()]
    fits = (path for path in there if path.name == DEVKIT or (path.suffix in (".txt", ".csv") and "val" in path.name))
    return next(fits, None)


def _shards(folder: Path, shards: list[Path]) -> Images:
    """WebDataset's, of which the first one is read, and the others are taken to be like it."""
    found = list(samples(shards[0], 0))
    if not found:
        raise bad_value("FOLDER", str(folder), f"{shards[0].name} holds no images")
    with open(shards[0], "rb") as file:
        sizes, broken = _sizes([_head(file, place) for place in _spread(found)], found[0].name)
    total = round(len(found) * sum(path.stat().st_size for path in shards) / shards[0].stat().st_size)
    notes = [f"{shards[0].name} was read; the other {len(shards) - 1} shards are taken to be like it"]
    classes = max(place.label for place in found) + 1
    each = max(1, total // classes)
    side, pixels = _middle(sizes)
    return Images(
        "webdataset", folder, classes, total, each, each, side, pixels, bool(shards_of(folder, "val")),
        (*notes, *_said(broken)),
    )  # fmt: skip


def _head(file: BinaryIO, place: Place) -> io.BytesIO:
    file.seek(place.offset)
    return io.BytesIO(file.read(place.size))


def _spread(things: Sequence[Thing]) -> Sequence[Thing]:
    """SAMPLE of them, or up to twice as many."""
    return things[:: max(1, len(things) // SAMPLE)]


def _sizes(files: Iterable[str | io.BytesIO], first: str) -> tuple[list[tuple[int, int]], int]:
    """(width and height of each image, images that cannot be read). Reads their heads. first: the name of one."""
    sizes, broken = list[tuple[int, int]](), 0
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's do not name the file
                with Image.open(file) as image:
                    sizes.append(image.size)
        except Exception:  # Pillow's readers raise what the bytes lead them to
            broken += 1
    if not sizes:
        raise InputError(f"FOLDER: none of {broken} images can be read, {first} is one")
    return sizes, broken


def _middle(sizes: list[tuple[int, int]]) -> tuple[int, float]:
    """(median shorter side, mean number of pixels)."""
    return int(median(min(size) for size in sizes)), sum(w * h for w, h in sizes) / len(sizes)


def _said(broken: int) -> list[str]:
    return [f"{broken} of the images looked at cannot be read: ghostmask prepare will name them"] if broken else []
