"""How a folder of images becomes a dataset: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, as torchvision reads them.

Images keep their shape; one whose shorter side is longer than data.max_resolution is shrunk to it when it is written.
Training: random resized crop and flip. Evaluation: the centre square of 224/256 of the shorter side.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.source import Augmentation, Images, Source, as_images, fingerprint_files
from ghostmask.engine.errors import InputError, bad_value

FOLDERS = {"train": "train", "eval": "val"}
# ImageNet's, the usual choice for photographs.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagefolder(config: DataConfig) -> Source:
    """As many classes as ROOT/train has folders; side data.image_size (0 = 224)."""
    root = Path(config.root)

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
        num_classes=len(class_folders(root / FOLDERS["train"])),
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
    """The image in RGB (gray, palette and CMYK files too), its shorter side at most max_resolution."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"data.root: {path} is not a readable image ({error}); remove or replace it") from error
    ratio = max_resolution / min(image.size)
    if ratio >= 1:
        return image
    width, height = (max(max_resolution, round(side * ratio)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _read_folder(root: Path, split: str, max_resolution: int) -> Any:
    from torchvision.datasets import ImageFolder

    folder = root / FOLDERS[split]
    if not folder.is_dir():
        raise bad_value("data.root", str(root), f"there is no folder {folder}; give one with train/CLASS and val/CLASS")
    try:
        dataset = ImageFolder(str(folder), loader=lambda path: load_rgb(path, max_resolution))
    except FileNotFoundError as error:  # no class folder, or one without an image
        raise bad_value("data.root", str(root), f"{folder}: {error}") from error
    expected = class_folders(root / FOLDERS["train"])
    if dataset.classes != expected:
        odd = sorted(set(dataset.classes) ^ set(expected))
        raise bad_value(
            "data.root", str(root), f"train and val must have the same class folders; they differ in {odd[:5]}"
        )
    return dataset
