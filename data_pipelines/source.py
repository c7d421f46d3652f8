"""What a dataset must say about itself: the contract between one dataset's file and the rest of this package."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ghostmask.data_pipelines.beton import beton_path
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.engine.errors import bad_value

SPLITS = ("train", "eval")


class Stored(NamedTuple):
    """An image as its .beton keeps it."""

    data: NDArray[np.uint8]
    """(H, W, 3) pixels, or (n,) the bytes of a JPEG."""
    height: int
    width: int
    content: bytes
    """What it was made from: the bytes of the source's file, whatever is kept of them."""


class Images(Protocol):
    """One split, indexable: ((H, W, 3) uint8 or Stored, label in [0, num_classes)). Is pickled and forked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.uint8] | Stored, int]: ...


@runtime_checkable
class NamedImages(Images, Protocol):
    """Images of which each is known by itself: writing that was interrupted goes on, though others came or went.

    Looking at one may raise photograph.BadImage.
    """

    def key(self, index: int) -> bytes:
        """16 bytes that are others when the image, its name or its label are."""
        ...

    def name(self, index: int) -> str:
        """What messages call it."""
        ...


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image; an evaluation image is stored as the network sees it."""

    pad: int = 0
    """Zero pixels added on every side before a crop of the original size at a random place; 0 = no crop."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    resized_crop: bool = False
    """Random resized crop while decoding (Szegedy et al. 2015: area 8-100 %, aspect 3/4-4/3): images differ in size."""


@dataclass(frozen=True)
class Source:
    """A dataset, as the function that `data_pipelines.registry` names for it returns it. Making one reads no image."""

    name: str
    """Stem of the training .beton: the dataset and every setting that changes what is written."""
    num_classes: int
    """0 = not known while the source is absent: then the .beton files say."""
    image_size: int
    """Side of a training image in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per channel, of pixels scaled to [0, 1]."""
    augmentation: Augmentation
    images: Callable[[str], Images]
    """images("train") or images("eval"), downloaded where that is possible. Raises InputError where it is not."""
    fingerprint: Callable[[], str | None]
    """Identity of the source's content; None = the source is absent."""
    files: bool = True
    """Whether data.root must hold (or receive) source files."""
    class_names: Callable[[], list[str]] = list
    """In the order of the labels; [] where they have none. Called where the source is there."""
    class_words: Callable[[], dict[str, str]] = dict
    """Name of a class -> the class in words, where the source has both."""
    eval_name: str = ""
    """Stem of the evaluation .beton; "" = that of training."""
    eval_size: int = 0
    """Side of an evaluation image in pixels; 0 = that of a training image."""
    resize: int = 0
    """Shorter side that an evaluation image had before its centre was cropped; 0 = it is as it was."""
    interpolation: str = ""
    """How it was resized; "" = not at all."""
    exif: bool = False
    """Whether images are turned as their EXIF data say."""
    settings: dict[str, dict[str, int | float | str | bool]] = field(default_factory=dict)
    """Of each split, what its .beton is written with: training refuses one that says otherwise."""
    absent: str = ""
    """What to say where there is neither a source nor a .beton."""

    def beton(self, root: str, split: str) -> Path:
        """Where the .beton of a split lies."""
        return beton_path(root, (self.eval_name if split == "eval" else "") or self.name, split)


def fingerprint_files(folder: Path, files: Iterable[Path]) -> str:
    """Hash of the files' names (in whatever encoding the disk has them), sizes and modification times; of a link to
    nowhere its own. Reads no content."""
    digest = hashlib.sha256()
    for path in sorted(files):
        stat = path.stat() if path.exists() else path.lstat()
        numbers = f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()
        digest.update(os.fsencode(path.relative_to(folder)) + numbers)
    return digest.hexdigest()


def fixed_size(config: DataConfig, size: int) -> int:
    """size, the only one this dataset has. Raises InputError if data.image_size asks for another."""
    if config.image_size not in (0, size):
        raise bad_value(
            "data.image_size", config.image_size, f"{config.dataset} has {size} x {size} images; use {size}"
        )
    return size


def as_images(dataset: Any) -> Images:
    """A torchvision dataset of (PIL image, label) as Images."""
    return _Torchvision(dataset)


class _Torchvision:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.uint8], int]:
        image, label = self.dataset[index]
        return np.asarray(image.convert("RGB")), int(label)
