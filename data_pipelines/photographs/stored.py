"""How do photographs become a dataset, wherever they lie: what is kept of one for training, and one for evaluation.

Training: JPEG of quality 90 or pixels, of which the loader takes random resized crops. (A file's own bytes would take
twice the room, and longer to decode in every epoch.)
Evaluation: the pixels that torchvision's Resize and CenterCrop give on Pillow's image, so that accuracy is the files'.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.photographs.photograph import BadImage, read_rgb, shrunk
from ghostmask.data_pipelines.photographs.places import Places, shuffled, split_off
from ghostmask.data_pipelines.source import SPLITS, Augmentation, Images, Source, Stored
from ghostmask.engine.config import require
from ghostmask.engine.errors import bad_value

# ImageNet's, the usual choice for photographs.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224
SMALLEST_CROPPED = 128
"""Below this side the whole shorter side is seen in evaluation: there is no border to spare."""
JPEG_QUALITY = 90
LARGEST_RAW_BYTES = 1 << 23
"""FFCV's page: pixels that do not fit on one are stored as JPEG."""
LARGEST_EVAL = math.isqrt(LARGEST_RAW_BYTES // 3)
LONGEST_RESIZED = 1 << 19
"""Of an evaluation image before it is cropped: half a gigabyte."""


@dataclass(frozen=True)
class _Photographs:
    """Photographs of a split, named as source.NamedImages asks; exif: see `read_rgb`."""

    places: Places
    exif: bool

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> bytes:
        """See source.NamedImages."""
        return self.places.key(index)

    def name(self, index: int) -> str:
        """See source.NamedImages."""
        return self.places.name(index)

    def _read(self, index: int) -> tuple[bytes, Image, int]:
        """(the file's content, its image, its label). Raises BadImage."""
        data = _read(self.places, index)
        return data, read_rgb(data, self.name(index), exif=self.exif), int(self.places.labels[index])


@dataclass(frozen=True)
class Kept(_Photographs):
    """Photographs of a split as they are stored for training."""

    max_resolution: int
    jpeg_fraction: float

    def __getitem__(self, index: int, /) -> tuple[Stored, int]:
        data, image, label = self._read(index)
        pixels = np.asarray(shrunk(image, self.max_resolution))
        as_jpeg = _share(data) < self.jpeg_fraction or pixels.nbytes > LARGEST_RAW_BYTES
        return Stored(_encoded(pixels) if as_jpeg else pixels, pixels.shape[0], pixels.shape[1], data), label


@dataclass(frozen=True)
class Cropped(_Photographs):
    """Photographs of a split as the network sees them in evaluation."""

    size: int
    resize: int
    interpolation: str

    def __getitem__(self, index: int, /) -> tuple[Stored, int]:
        from torchvision.transforms.v2 import functional

        data, image, label = self._read(index)
        long = max(image.size) * self.resize // min(image.size)
        if long > LONGEST_RESIZED:
            raise BadImage(f"{self.name(index)} would become {long:,} pixels long in evaluation; crop or remove it")
        resized = functional.resize(image, [self.resize], functional.InterpolationMode(self.interpolation))
        pixels = np.asarray(functional.center_crop(resized, [self.size, self.size]))
        return Stored(pixels, self.size, self.size, data), label


def photographs(
    config: DataConfig,
    *,
    num_classes: int,
    train: Callable[[], Places],
    evaluation: Callable[[], Places] | None,
    present: Callable[[], bool],
    class_names: Callable[[], list[str]] = list,
    class_words: Callable[[], dict[str, str]] = dict,
    fingerprint: Callable[[], str] | None = None,
    absent: str,
) -> Source:
    """The dataset of these photographs; evaluation None: data.val_fraction of the training photographs.

    fingerprint: of the source where it costs less than all places of train and evaluation, which are asked for once.
    """
    if config.val_fraction and evaluation is not None:
        fix = "there are evaluation photographs of their own; leave it at 0"
        raise bad_value("data.val_fraction", config.val_fraction, fix)
    if config.val_labels and evaluation is None:
        fix = "there are no evaluation photographs of their own that it could name; leave it out, or data.val_fraction"
        raise bad_value("data.val_labels", config.val_labels, fix)
    size = config.eval_size or config.image_size or SIDE
    resize = config.eval_resize or (round(size * 256 / 224) if size >= SMALLEST_CROPPED else size)
    fix = f"an evaluation image is stored as pixels on a page of FFCV's; give at most {LARGEST_EVAL}"
    require(size <= LARGEST_EVAL, "data.eval_size", size, fix)
    require(resize >= size, "data.eval_resize", resize, f"give at least data.eval_size = {size}, or 0")

    @cache
    def places() -> dict[str, Places]:
        all_of_train = train()
        if not len(all_of_train):
            raise bad_value("data.root", config.root, absent)
        # Not class by class: a page of the file holds all kinds of images, for data.order=quasi_random.
        all_of_train = shuffled(all_of_train)
        if evaluation:
            return {"train": all_of_train, "eval": evaluation()}
        return dict(zip(SPLITS, split_off(all_of_train, config.val_fraction, config.val_seed), strict=True))

    def images(split: str) -> Images:
        if split == "eval":
            return Cropped(places()[split], config.exif, size, resize, config.interpolation)
        return Kept(places()[split], config.exif, config.max_resolution, config.jpeg_fraction)

    @cache  # of what the places are of: a tar file that is replaced while others are written is another source
    def identity() -> str | None:
        if not present():
            return None
        if fingerprint is not None:
            return fingerprint()
        text = "".join(places()[split].fingerprint() for split in SPLITS)
        return hashlib.sha256(text.encode()).hexdigest()

    common = {"exif": config.exif, "val_fraction": config.val_fraction, "val_seed": config.val_seed}
    settings: dict[str, dict[str, int | float | str | bool]] = {
        "train": {"max_resolution": config.max_resolution, "jpeg_fraction": config.jpeg_fraction, **common},
        "eval": {"size": size, "resize": resize, "interpolation": config.interpolation, **common},
    }
    drawn = f"-v{config.val_fraction:g}s{config.val_seed}" if config.val_fraction else ""
    suffix = f"{'-exif' if config.exif else ''}{drawn}"
    return Source(
        name=f"{config.dataset}-r{config.max_resolution}-j{config.jpeg_fraction:g}{suffix}",
        num_classes=num_classes,
        image_size=config.image_size or SIDE,
        mean=MEAN,
        std=STD,
        augmentation=Augmentation(flip=True, resized_crop=True),
        images=images,
        fingerprint=identity,
        class_names=class_names,
        class_words=class_words,
        eval_name=f"{config.dataset}-{size}of{resize}-{config.interpolation}{suffix}",
        eval_size=size,
        resize=resize,
        interpolation=config.interpolation,
        exif=config.exif,
        settings=settings,
        absent=absent,
    )


def _read(places: Places, index: int) -> bytes:
    try:
        return places.read(index)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadImage(f"{places.name(index)} is not a readable image ({reason}); remove or replace it") from error


def _share(data: bytes) -> float:
    """A number in [0, 1) that is the same wherever the same image is."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "little") / 2.0**48


def _encoded(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from ffcv.fields.rgb_image import encode_jpeg

    encoded: NDArray[np.uint8] = encode_jpeg(pixels, JPEG_QUALITY)
    return encoded
