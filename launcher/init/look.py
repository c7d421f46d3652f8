"""What lies in a folder of images: how it is laid out, how many classes and images, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from ghostmask.data_pipelines.photographs.val_labels import DEVKIT
from ghostmask.data_pipelines.sources.imagefolder import EXTENSIONS, class_folders, images_below
from ghostmask.engine.errors import InputError, bad_value

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
    shards = sorted([*folder.glob("train/*.tar"), *folder.glob("*train*.tar")])
    if shards:
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
    notes = []
    val = set(class_folders(root / "val"))
    labels = _labels(root) if (root / "val").is_dir() and not val & set(classes) else None
    if (root / "val").is_dir() and not labels and val != set(classes):
        odd = sorted(val ^ set(classes))[:3]
        raise bad_value("FOLDER", str(folder), f"train and val must have the same class folders; they differ in {odd}")
    side, pixels, broken = _sizes(classes)
    if broken:
        notes.append(f"{broken} of the images looked at cannot be read: ghostmask prepare will name them")
    counts = [len(images) for images in classes.values()]
    return Images(
        "imagefolder", root, len(classes), sum(counts), min(counts), max(counts), side, pixels, bool(val or labels),
        tuple(notes), labels,
    )  # fmt: skip


def _labels(root: Path) -> Path | None:
    """A file in the folder of the evaluation images, or above it, that says what they are; None without one."""
    there = [path for folder in (root / "val", root) for path in sorted(folder.iterdir()) if path.is_file()]
    fits = (path for path in there if path.name == DEVKIT or (path.suffix in (".txt", ".csv") and "val" in path.name))
    return next(fits, None)


def _shards(folder: Path, shards: list[Path]) -> Images:
    """WebDataset's, of which the first one is read, and the others are taken to be like it."""
    import io
    import json
    import tarfile

    labels: set[int] = set()
    sizes: list[tuple[int, int]] = []
    images = 0
    with tarfile.open(shards[0]) as archive:
        for member in archive:
            suffix = member.name.rpartition(".")[2].lower()
            file = archive.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if f".{suffix}" in EXTENSIONS:
                images += 1
                if len(sizes) < SAMPLE:
                    with Image.open(io.BytesIO(file.read())) as image:
                        sizes.append(image.size)
            elif suffix == "cls":
                labels.add(int(file.read()))
            elif suffix == "json":
                labels.add(int(json.loads(file.read())["label"]))
    if not sizes or not labels:
        raise bad_value("FOLDER", str(folder), f"{shards[0].name} holds no images with .cls or .json beside them")
    total = round(images * sum(path.stat().st_size for path in shards) / shards[0].stat().st_size)
    note = f"{shards[0].name} was read; the other {len(shards) - 1} shards are taken to be like it"
    each = max(1, total // (max(labels) + 1))
    side, pixels = median(min(size) for size in sizes), sum(w * h for w, h in sizes) / len(sizes)
    split = bool([*folder.glob("val/*.tar"), *folder.glob("*val*.tar")])
    return Images("webdataset", folder, max(labels) + 1, total, each, each, int(side), pixels, split, (note,))


def _sizes(classes: dict[str, list[str]]) -> tuple[int, float, int]:
    """(median shorter side, mean number of pixels, images that cannot be read) of SAMPLE images. Reads their heads."""
    paths = [path for images in classes.values() for path in images]
    sizes, broken = [], 0
    for path in paths[:: max(1, len(paths) // SAMPLE)]:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        except OSError:
            broken += 1
    if not sizes:
        raise InputError(f"FOLDER: none of {broken} images can be read, {paths[0]} is one")
    return int(median(min(size) for size in sizes)), sum(w * h for w, h in sizes) / len(sizes), broken
