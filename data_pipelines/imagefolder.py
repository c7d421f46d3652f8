"""How a folder of images becomes a dataset: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, as torchvision reads them.

Images keep their shape; one whose shorter side is longer than data.max_resolution is shrunk to it when it is written.
Training: random resized crop and flip. Evaluation: the centre square of 224/256 of the shorter side.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.source import Augmentation, Images, Source, as_images, fingerprint_files
from ghostmask.engine.errors import InputError, bad_value, printable, to_stderr

FOLDERS = {"train": "train", "eval": "val"}
# ImageNet's, the usual choice for photographs.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagefolder(config: DataConfig) -> Source:
    """As many classes as ROOT/train has folders; side data.image_size (0 = 224). Raises InputError for one class."""
    root = Path(config.root)
    names = class_folders(root / FOLDERS["train"])
    if len(names) == 1:
        fix = f"{root / FOLDERS['train']} holds one class folder, {names[0]}: are the images one folder too deep?"
        raise bad_value("data.root", config.root, fix)

    def images(split: str) -> Images:
        return as_images(_read_folder(root, split, config.max_resolution))

    def fingerprint() -> str | None:
        folders = [root / name for name in FOLDERS.values()]
        if not all(folder.is_dir() for folder in folders):
            return None
        files = (
            Path(at) / f for folder in folders for at, _, names in os.walk(folder, followlinks=True) for f in names
        )
        return fingerprint_files(root, files)

    return Source(
        name=f"imagefolder-r{config.max_resolution}-j{config.jpeg_fraction:g}",
        num_classes=len(names),
        image_size=config.image_size or 224,
        mean=MEAN,
        std=STD,
        augmentation=Augmentation(flip=True, resized_crop=True),
        images=images,
        fingerprint=fingerprint,
        jpeg_fraction=config.jpeg_fraction,
    )


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted: class k is the k-th; [] if there is no such folder."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []


def load_rgb(path: str, max_resolution: int) -> Image.Image:
    """The image in RGB (gray of 8 and 16 bits, palette and CMYK files too), its shorter side at most max_resolution.

    Raises InputError for a file that is none.
    """
    try:
        with Image.open(path) as file:
            image = _eight_bits(file).convert("RGB")
    except Exception as error:  # Pillow's readers raise what the bytes lead them to: struct.error, KeyError, ...
        raise InputError(f"data.root: {path} is not a readable image ({error}); remove or replace it") from error
    ratio = max_resolution / min(image.size)
    if ratio >= 1:
        return image
    width, height = (max(max_resolution, round(side * ratio)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits as gray of 8: Pillow's own conversion cuts all that is above 255 to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if image.mode == "I" and not 0 <= values.min() <= values.max() <= 65_535:
            raise ValueError("gray of 32 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("gray of floating-point numbers")
    return image


def _read_folder(root: Path, split: str, max_resolution: int) -> Any:
    from torchvision.datasets import ImageFolder

    folder = root / FOLDERS[split]
    if not folder.is_dir():
        raise bad_value("data.root", str(root), f"there is no folder {folder}; give one with train/CLASS and val/CLASS")
    try:
        dataset = ImageFolder(str(folder), loader=partial(load_rgb, max_resolution=max_resolution))
    except FileNotFoundError as error:  # no class folder, or one without an image
        raise bad_value("data.root", str(root), f"{folder}: {error}") from error
    _say_what_is_left_out(folder, {path for path, _ in dataset.samples})
    expected = class_folders(root / FOLDERS["train"])
    if dataset.classes != expected:
        odd = sorted(set(dataset.classes) ^ set(expected))
        raise bad_value(
            "data.root", str(root), f"train and val must have the same class folders; they differ in {odd[:5]}"
        )
    return dataset


def _say_what_is_left_out(folder: Path, taken: set[str]) -> None:
    """A warning that counts, by suffix, the files which torchvision does not take for images; hidden ones are none."""
    left = [
        path
        for at, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".") and (path := os.path.join(at, name)) not in taken
    ]
    if left:
        kinds = Counter(os.path.splitext(path)[1] or "no suffix" for path in left)
        counted = ", ".join(f"{number} with {kind}" for kind, number in kinds.most_common(5))
        to_stderr(
            printable(f"{folder}: {len(left)} files are left out, not images by their names: {counted}; {left[0]}")
        )
