"""How a rank gets its batches: two .beton files behind engine.data's DataPipeline, for one process of a world.

rows (index, random word)  ->  decoded, cropped, shifted, flipped in  ->  copy to the device  ->  normalised
a function of (seed,           FFCV's threads into its own buffers,        (CUDA: page-locked,    on the whole batch,
epoch, parts), see `order`     three batches ahead, see `decode`           on a side stream)      see `normalise`
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.loading import order
from ghostmask.data_pipelines.loading.decode import ResizedCrop, WholeImage
from ghostmask.data_pipelines.loading.loader import BetonLoader
from ghostmask.data_pipelines.loading.normalise import Normalisation
from ghostmask.data_pipelines.loading.order import Words
from ghostmask.data_pipelines.loading.quasi_random import quasi_random
from ghostmask.data_pipelines.loading.resizing import image_side
from ghostmask.data_pipelines.source import Augmentation, Source
from ghostmask.engine.data import Batch, Parts
from ghostmask.engine.world import World


class BetonPipeline:
    """Training and evaluation batches of one rank. See engine.data.DataPipeline for the promises it keeps."""

    def __init__(
        self, config: DataConfig, source: Source, paths: dict[str, Path], num_classes: int, contents: dict[str, str], *,
        seed: int, world: World, parts: Parts,
    ) -> None:  # fmt: skip
        """paths, contents (see beton.Manifest): of train and eval; config.batch_size is a multiple of parts.total."""
        self.parts = parts
        self.num_classes = num_classes
        self.image_shape = (3, source.image_size, source.image_size)
        self.batch_size = config.batch_size
        self._config, self._seed, self._world = config, seed, world
        self._by_page = config.order == "quasi_random"
        self._normalise = Normalisation.of(
            source.mean, source.std, max(source.image_size, source.eval_size), world.device
        )
        share = config.batch_size // parts.total * parts.count
        augmentations = {"train": source.augmentation if config.augment else Augmentation(), "eval": Augmentation()}
        self._loaders = {
            split: BetonLoader(
                paths[split],
                ResizedCrop(source.image_size, augmentation, config.fast_decode)
                if source.augmentation.resized_crop and split == "train"
                else WholeImage(augmentation),
                share,
                config.num_workers,
                num_classes,
            )
            for split, augmentation in augmentations.items()
        }
        self.num_train, self.num_eval = len(self._loaders["train"]), len(self._loaders["eval"])
        self.steps_per_epoch = self.num_train // config.batch_size
        self.identity: dict[str, int | str] = {
            "training images": self.num_train, "evaluation images": self.num_eval, "classes": num_classes,
            "batch size": config.batch_size, "steps per epoch": self.steps_per_epoch,
            "training content": contents["train"], "evaluation content": contents["eval"],
        }  # fmt: skip
        if self._by_page:  # their order depends on it
            self.identity["pages of the training file"] = zlib.crc32(self._loaders["train"].pages.tobytes())

    def train(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Batches first_step, first_step + 1, ... of epoch: this rank's parts of each, one part after the other."""
        rows, side = self.train_rows(epoch, first_step), image_side(self._config, self.image_shape[1], epoch)
        return self._batches(self._loaders["train"].batches(rows, side, read_ahead=self._by_page))

    def train_rows(self, epoch: int, first_step: int) -> Words:
        """See `order`: of the batches that `train` yields."""
        samples = None
        if self._by_page:
            samples = quasi_random(
                self._seed, epoch, self._loaders["train"].pages, batch_size=self.batch_size,
                num_parts=self.parts.total, window_pages=self._config.window_pages,
            )  # fmt: skip
        return order.train_rows(
            self._seed, epoch, num_train=self.num_train, batch_size=self.batch_size, parts=self.parts,
            first_step=first_step, samples=samples,
        )  # fmt: skip

    def evaluate(self) -> Generator[Batch]:
        """Every evaluation image exactly once over all ranks; ranks may yield different numbers of batches."""
        rows = order.eval_rows(self.num_eval, self._world.rank, self._world.size)
        return self._batches(self._loaders["eval"].batches(rows))

    def close(self) -> None:
        """Stop loader threads and free their buffers."""
        for loader in self._loaders.values():
            loader.close()

    def _batches(self, host: Generator[_Pair]) -> Generator[Batch]:
        on_cuda = self._world.device.type == "cuda"
        try:
            for images, labels in _one_copied_ahead(host, self._world.device) if on_cuda else host:
                yield Batch(self._normalise(images), labels)
        finally:
            host.close()


def _one_copied_ahead(host: Iterator[_Pair], device: torch.device) -> Iterator[_Pair]:
    """The batches on a CUDA device: batch k + 1 is copied on a side stream while the caller computes on batch k."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ahead: _Pair | None = None
    for images, labels in host:
        with torch.cuda.stream(side):
            following = images.to(device, non_blocking=True), labels.pin_memory().to(device, non_blocking=True)
            copied.record(side)
        if ahead is not None:
            yield ahead
        # The copy had a whole step to finish; FFCV reuses the buffer once its next batch is asked for.
        copied.synchronize()
        for tensor in following:
            tensor.record_stream(torch.cuda.current_stream(device))
        ahead = following
    if ahead is not None:
        yield ahead


_Pair = tuple[Tensor, Tensor]
"""Images uint8 and labels int64 of a batch."""
