"""What the engine asks of data: batches from any position on. `data_pipelines` implements it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """This rank's share of one global batch, on the rank's device.

    images: (N, 3, H, W) float32, normalised, channels_last; labels: (N,) int64 in [0, num_classes).
    """

    images: Tensor
    labels: Tensor


class PartBatch(NamedTuple):
    """What one forward pass is given: a part's images and labels, as in Batch, and what hooks have made of them.

    soft: (N, num_classes) float32, targets that sum to 1, in the place of the labels; teacher: (N, num_classes) float32
    logits to learn from too.
    """

    images: Tensor
    labels: Tensor
    soft: Tensor | None = None
    teacher: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """The parts of every global batch that one rank computes: [first, first + count) of `total`.

    Sample i of a global batch belongs to part i mod total, whatever the number of ranks.
    """

    total: int = 1
    first: int = 0
    count: int = 1


class DataPipeline(Protocol):
    """Batches of a training and an evaluation set for one rank of a world.

    The order of samples and their augmentation are functions of (seed, epoch, sample index) alone.
    """

    parts: Parts
    """The parts of every global batch that this rank gets."""

    num_classes: int
    image_shape: tuple[int, int, int]
    """(channels, height, width) of a training batch."""
    num_train: int
    num_eval: int
    batch_size: int
    """Global batch: samples that all ranks together see per optimizer step."""
    steps_per_epoch: int
    """num_train // batch_size: the last incomplete global batch is left out."""
    identity: dict[str, int | str]
    """What these data are, by name of a property: equal for the same images in the same order, wherever they lie. Kept
    in checkpoints. "steps per epoch", "batch size" and "classes" are among the names."""

    def train(self, epoch: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """Batches first_step, first_step + 1, ... of epoch: this rank's parts of each, one part after the other.

        Part p is samples p, p + parts.total, ... of the global batch; all parts have batch_size / parts.total images.
        """
        ...

    def evaluate(self) -> Iterator[Batch]:
        """Every evaluation image exactly once over all ranks; ranks may yield different numbers of batches."""
        ...

    def close(self) -> None:
        """Stop loader threads and free their buffers."""
        ...
