"""How a rank gets its batches: two .beton files behind engine.data's DataPipeline, for one process of a world.

rows (index, random word)  ->  FFCV decodes uint8 in threads  ->  copy to the device  ->  shift, flip, normalise
a function of (seed,           into buffers of its own, three       (CUDA: page-locked,    on the whole batch,
epoch, rank), see `order`      batches ahead                        on a side stream)      see `augment`
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines import order
from data_pipelines.augment import Normalisation, draws, shift_and_flip
from data_pipelines.config import DataConfig
from data_pipelines.decode import ResizedCrop, WholeImage
from data_pipelines.loader import BetonLoader
from data_pipelines.order import Words
from data_pipelines.source import Augmentation, Source
from engine.data import Batch
from engine.world import World


class BetonPipeline:
    """Training and evaluation batches of one rank. See engine.data.DataPipeline for the promises it keeps."""

    def __init__(
        self, config: DataConfig, source: Source, paths: dict[str, Path], num_classes: int, *, seed: int, world: World
    ) -> None:
        """paths: of splits train and eval; config.batch_size is a multiple of world.size."""
        self.num_classes = num_classes
        self.image_shape = (3, source.image_size, source.image_size)
        self.batch_size = config.batch_size
        self._seed, self._world = seed, world
        self._augmentation = source.augmentation if config.augment else Augmentation()
        self._normalise = Normalisation.of(source.mean, source.std, source.image_size, world.device)
        share = config.batch_size // world.size
        crops = {"train": source.augmentation.resized_crop and config.augment, "eval": False}
        self._loaders = {
            split: BetonLoader(
                paths[split],
                ResizedCrop(source.image_size, crops[split]) if source.augmentation.resized_crop else WholeImage(),
                share,
                config.num_workers,
                num_classes,
            )
            for split in ("train", "eval")
        }
        self.num_train, self.num_eval = len(self._loaders["train"]), len(self._loaders["eval"])
        self.steps_per_epoch = self.num_train // config.batch_size

    def train(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Batches first_step, first_step + 1, ... of epoch: rank r gets samples r, r + size, ... of each."""
        rows = order.train_rows(
            self._seed,
            epoch,
            num_train=self.num_train,
            batch_size=self.batch_size,
            rank=self._world.rank,
            num_ranks=self._world.size,
            first_step=first_step,
        )
        return self._batches("train", rows, self._augmentation)

    def evaluate(self) -> Generator[Batch]:
        """Every evaluation image exactly once over all ranks; ranks may yield different numbers of batches."""
        rows = order.eval_rows(self.num_eval, self._world.rank, self._world.size)
        return self._batches("eval", rows, Augmentation())

    def close(self) -> None:
        """Stop loader threads and free their buffers."""
        for loader in self._loaders.values():
            loader.close()

    def _batches(self, split: str, rows: Words, augmentation: Augmentation) -> Generator[Batch]:
        loader = self._loaders[split]
        host = loader.batches(rows)
        place = self._on_cuda if self._world.device.type == "cuda" else _on_cpu
        try:
            for images, labels, drawn in place(loader, host, augmentation):
                pixels = images if drawn is None else shift_and_flip(images, drawn, augmentation)
                yield Batch(self._normalise(pixels), labels)
        finally:
            host.close()

    def _on_cuda(self, loader: BetonLoader, host: Any, augmentation: Augmentation) -> Iterator[_Placed]:
        """One batch ahead: batch k + 1 is copied on a side stream while the caller computes on batch k."""
        device = self._world.device
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ahead: _Placed | None = None
        for images, rows in host:
            with torch.cuda.stream(side):
                following = _place(loader, images, rows, augmentation, device)
                copied.record(side)
            if ahead is not None:
                yield ahead
            # The copy had a whole step to finish; FFCV reuses the buffer once its next batch is asked for.
            copied.synchronize()
            current = torch.cuda.current_stream(device)
            for tensor in following:
                if tensor is not None:
                    tensor.record_stream(current)
            ahead = following
        if ahead is not None:
            yield ahead


_Placed = tuple[Tensor, Tensor, Tensor | None]
"""images uint8, labels, draws of the augmentation (None = there is none), all on the device."""


def _on_cpu(loader: BetonLoader, host: Any, augmentation: Augmentation) -> Iterator[_Placed]:
    for images, rows in host:
        yield _place(loader, images, rows, augmentation, torch.device("cpu"))


def _place(
    loader: BetonLoader, images: Tensor, rows: Words, augmentation: Augmentation, device: torch.device
) -> _Placed:
    labels = torch.from_numpy(loader.labels[rows[:, 0]])
    drawn = draws(rows[:, 1], augmentation) if augmentation.pad or augmentation.flip else None
    if device.type == "cpu":
        return images, labels, drawn
    on_device = images.to(device, non_blocking=True)
    return (
        on_device,
        labels.pin_memory().to(device, non_blocking=True),
        None if drawn is None else drawn.pin_memory().to(device, non_blocking=True),
    )
