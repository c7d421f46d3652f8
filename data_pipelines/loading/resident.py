"""How does a rank get its batches without a loader: small images that live on the device, augmented there in batches.

The same order, draws and pixels as FFCV's loader, so the same bits: whichever a run, or a resumed run, is fed by makes
no difference. Every image lies in a border of zeros, a pixel in four bytes: a whole batch, shifted and mirrored, is one
gather, in which pixel (row, column) of sample k is store[start[k] + places[mirrored[k], row, column]].
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.loading import order
from ghostmask.data_pipelines.loading.order import Words
from ghostmask.data_pipelines.loading.pipeline import BetonPipeline
from ghostmask.data_pipelines.source import Augmentation, Source
from ghostmask.engine.data import Batch, Parts
from ghostmask.engine.world import World

PIXEL_BYTES = 4


class ResidentPipeline(BetonPipeline):
    """BetonPipeline's promises, kept by tensors on the device. Each rank holds all images: each may get any of them."""

    def __init__(
        self, config: DataConfig, source: Source, paths: dict[str, Path], num_classes: int, contents: dict[str, str], *,
        seed: int, world: World, parts: Parts,
    ) -> None:  # fmt: skip
        """As BetonPipeline, of a source whose images are of one size; its files are read once, and closed."""
        plain = replace(config, augment=False)
        super().__init__(plain, source, paths, num_classes, contents, seed=seed, world=world, parts=parts)
        augmentation = source.augmentation if config.augment else Augmentation()
        self._share = config.batch_size // parts.total * parts.count
        self._stores = {
            split: Store.read(
                loader.batches(order.eval_rows(len(loader), 0, 1)),
                len(loader),
                source.image_size,
                augmentation if split == "train" else Augmentation(),
                world.device,
            )
            for split, loader in self._loaders.items()
        }
        self.close()

    def train(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        return self._gathered("train", self.train_rows(epoch, first_step))

    def evaluate(self) -> Generator[Batch]:
        return self._gathered("eval", order.eval_rows(self.num_eval, self._world.rank, self._world.size))

    def _gathered(self, split: str, rows: Words) -> Generator[Batch]:
        store, device = self._stores[split], self._world.device
        start, mirrored, samples = (torch.from_numpy(column).to(device) for column in store.draws(rows))
        for first in range(0, len(rows), self._share):
            some = slice(first, first + self._share)
            images = store.gather(start[some], mirrored[some])
            yield Batch(self._normalise(images), store.labels[samples[some]])


@dataclass(frozen=True)
class Store:
    """The images of one split. pixels: (n * side * side,) int32, red, green, blue and a zero in its bytes, side being
    the images' with the border; places: (2, height, width) int64, of a crop's pixels from its first one, as they are
    and mirrored."""

    pixels: Tensor
    labels: Tensor
    places: Tensor
    side: int
    augmentation: Augmentation

    @classmethod
    def read(
        cls, batches: Generator[tuple[Tensor, Tensor]], number: int, size: int, augmentation: Augmentation,
        device: torch.device,
    ) -> Store:  # fmt: skip
        """From all images in their order, (n, size, size, 3) uint8 with labels, in batches."""
        pad = augmentation.pad
        side = size + 2 * pad
        pixels = torch.zeros(number, side, side, PIXEL_BYTES, dtype=torch.uint8, device=device)
        labels, first = [], 0
        with closing(batches):
            for images, some in batches:
                inner = pixels[first : first + len(images), pad : pad + size, pad : pad + size, :3]
                inner.copy_(images)
                labels.append(some.to(device))
                first += len(images)
        row, column = torch.arange(size, device=device)[:, None] * side, torch.arange(size, device=device)
        places = torch.stack([row + column, row + column.flip(0)])
        return cls(pixels.view(torch.int32).reshape(-1), torch.cat(labels), places, side, augmentation)

    def draws(self, rows: Words) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(first pixel of the crop, 1 where mirrored, sample) of each row: `decode.draws` on all rows at once."""
        samples, words = rows[:, 0].astype(np.int64), rows[:, 1]
        places, low = np.uint64(2 * self.augmentation.pad + 1), np.uint64(0xFFFF)
        down = ((words >> np.uint64(16)) & low) * places >> np.uint64(16)
        right = ((words >> np.uint64(32)) & low) * places >> np.uint64(16)
        mirrored = (words & np.uint64(self.augmentation.flip)).astype(np.int64)
        first = samples * self.side**2 + down.astype(np.int64) * self.side + right.astype(np.int64)
        return first, mirrored, samples

    def gather(self, start: Tensor, mirrored: Tensor) -> Tensor:
        """(n, height, width, 3) uint8: a view of a new tensor."""
        pixels = self.pixels[self.places[mirrored] + start[:, None, None]]
        return pixels.unsqueeze(-1).view(torch.uint8)[..., :3]
