"""What the engine asks of data: batches from any position on. `data_pipelines` implements it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """This rank's share of one global batch, on the rank's device.

    images: (N, 3, H, W) float32, normalised, channels_last; labels: (N,) int64 in [0, num_classes).
    """

    images: Tensor
    labels: Tensor


class DataPipeline(Protocol):
    """Batches of a training and an evaluation set for one rank of a world.

    The order of samples and their augmentation are functions of (seed, epoch, sample index) alone.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    """(channels, height, width) of a training batch."""
    num_train: int
    num_eval: int
    batch_size: int
    """Global batch: samples that all ranks together see per optimizer step."""
    steps_per_epoch: int
    """num_train // batch_size: the last incomplete global batch is left out."""

    def train(self, epoch: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """Batches first_step, first_step + 1, ... of epoch; rank r gets samples r, r + size, ... of a global batch."""
        ...

    def evaluate(self) -> Iterator[Batch]:
        """Every evaluation image exactly once over all ranks; ranks may yield different numbers of batches."""
        ...

    def close(self) -> None:
        """Stop loader threads and free their buffers."""
        ...
