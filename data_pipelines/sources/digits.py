"""How the 1,797 handwritten digits of scikit-learn become a dataset: 8 x 8 pixels, needs no download.

scikit-learn has no official split. Ours is fixed for ever: within each class the images are put in an order drawn from
Philox with key SPLIT_SEED; the first fifth (rounded) is for evaluation: 1,438 + 359 images.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.loading import order
from ghostmask.data_pipelines.source import Augmentation, Images, Source, fixed_size
from ghostmask.engine.errors import InputError

SPLIT_SEED = 0
EVAL_SHARE = 0.2
# Digits are not mirror-symmetric (2, 5, 7): no flip.
SHIFT = Augmentation(pad=1)
MEAN, STD = 0.3057, 0.3763


def digits(config: DataConfig) -> Source:
    """Gray 8 x 8 images in three equal channels, 10 classes."""
    size = fixed_size(config, 8)
    return Source(
        "digits", 10, size, (MEAN,) * 3, (STD,) * 3, SHIFT, _split, lambda: _fingerprint(*_read()), files=False
    )  # fmt: skip


def split_indices(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, eval): rising indices of a stratified split, each class 4 : 1."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = members[order.permutation(SPLIT_SEED, int(label), len(members), order.SPLIT)]
        chosen[shuffled[: round(EVAL_SHARE * len(members))]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


class _Digits:
    def __init__(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.uint8], int]:
        return np.repeat(self.pixels[index][:, :, None], 3, axis=2), int(self.labels[index])


def _split(split: str) -> Images:
    pixels, labels = _read()
    train, evaluation = split_indices(labels)
    indices = train if split == "train" else evaluation
    return _Digits(pixels[indices], labels[indices])


def _read() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(1797, 8, 8) uint8 and (1797,) labels; scikit-learn's 0..16 becomes 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "data.dataset = 'digits': needs scikit-learn; install it, or ghostmask with its extra [digits]"
        ) from error
    data: Any = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64)


def _fingerprint(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    return hashlib.sha256(pixels.tobytes() + labels.tobytes() + f"{SPLIT_SEED} {EVAL_SHARE}".encode()).hexdigest()
