"""How images are made that need no data: one pattern per class under noise, the same on every machine, learnable."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.loading import order
from ghostmask.data_pipelines.source import Augmentation, Images, Source
from ghostmask.engine.config import require_number

PATTERN_SEED, NOISE_SEED = 1, 2
CELLS = 4
"""A pattern is CELLS x CELLS patches, each brighter or darker in each channel."""
CONTRAST, NOISE = 24, 128
"""Gray levels: a patch is 128 +- CONTRAST, and uniform noise of width NOISE lies over every pixel."""
# Std in [0, 1] of uniform noise of width 128 plus +-24: sqrt(128^2 / 12 + 24^2) / 255.
MEAN, STD = 0.5, 0.173


def synthetic(config: DataConfig) -> Source:
    """data.num_train + data.num_eval images of data.num_classes classes; side data.image_size (0 = 32)."""
    size = config.image_size or 32
    require_number("data.image_size", size, CELLS)
    counts = {"train": config.num_train, "eval": config.num_eval}

    def images(split: str) -> Images:
        return SyntheticImages(split == "train", counts[split], config.num_classes, size)

    name = f"synthetic-n{config.num_train}-e{config.num_eval}-c{config.num_classes}-s{size}"
    identity = f"{name} patterns {CELLS} {CONTRAST} {NOISE} {PATTERN_SEED} {NOISE_SEED}"
    return Source(
        name,
        config.num_classes,
        size,
        (MEAN,) * 3,
        (STD,) * 3,
        Augmentation(pad=2),
        images,
        fingerprint=lambda: identity,
        files=False,
    )


class SyntheticImages:
    """Image i belongs to class i mod num_classes."""

    def __init__(self, train: bool, num_images: int, num_classes: int, size: int) -> None:
        self.train, self.num_images, self.num_classes, self.size = train, num_images, num_classes, size
        self.patterns = np.stack([_pattern(c, size) for c in range(num_classes)])

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.uint8], int]:
        label = index % self.num_classes
        num_bytes = self.size * self.size * 3
        stream = 2 * index + int(self.train)
        words = order.raw_words(NOISE_SEED, stream, order.STORAGE, (num_bytes + 7) // 8)
        noise = words.astype("<u8").view(np.uint8)[:num_bytes].reshape(self.size, self.size, 3)
        levels = self.patterns[label] + noise.astype(np.int64) * NOISE // 256 - NOISE // 2
        return levels.astype(np.uint8), label


def _pattern(label: int, size: int) -> NDArray[np.int64]:
    """(size, size, 3) gray levels 128 +- CONTRAST."""
    bits = order.raw_words(PATTERN_SEED, label, order.STORAGE, CELLS * CELLS * 3) >> np.uint64(63)
    cells = (128 - CONTRAST + 2 * CONTRAST * bits.astype(np.int64)).reshape(CELLS, CELLS, 3)
    at = np.arange(size) * CELLS // size
    return np.asarray(cells[at][:, at])
