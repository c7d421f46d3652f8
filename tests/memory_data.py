"""A DataPipeline over tensors in memory, for tests of the engine that are not about loading."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from ghostmask.engine.data import Batch, Parts
from ghostmask.engine.world import World


class MemoryData:
    """Learnable images: class k has mean pattern k. Order and content are functions of (seed, epoch).

    parts: those of each global batch that this rank gets; None = there are as many as ranks, and rank r gets part r.
    fed: for each training batch its number and the indices of its samples, in the rank's order.
    """

    image_shape = (3, 8, 8)

    def __init__(
        self, world: World, num_train: int = 96, num_eval: int = 50, batch_size: int = 24, parts: Parts | None = None
    ) -> None:
        self.parts = parts or Parts(world.size, world.rank, 1)
        self.world, self.num_train, self.num_eval, self.batch_size = world, num_train, num_eval, batch_size
        self.num_classes, self.steps_per_epoch = 4, num_train // batch_size
        self.identity: dict[str, int | str] = {
            "training images": num_train, "batch size": batch_size, "steps per epoch": self.steps_per_epoch,
            "classes": 4,
        }  # fmt: skip
        generator = torch.Generator().manual_seed(7)
        patterns = torch.randn(self.num_classes, *self.image_shape, generator=generator)
        total = num_train + num_eval
        self.labels = torch.arange(total) % self.num_classes
        self.images = patterns[self.labels] + 0.5 * torch.randn(total, *self.image_shape, generator=generator)
        self.poison_at: tuple[int, int] | None = None
        self.fed: list[tuple[int, list[int]]] = []

    def train(self, epoch: int, first_step: int = 0) -> Generator[Batch, None, None]:
        first = self.parts.first
        order = torch.randperm(self.num_train, generator=torch.Generator().manual_seed(100 + epoch))
        for step in range(first_step, self.steps_per_epoch):
            whole = order[step * self.batch_size : (step + 1) * self.batch_size]
            chosen = torch.cat([whole[p :: self.parts.total] for p in range(first, first + self.parts.count)])
            self.fed.append((epoch * self.steps_per_epoch + step, chosen.tolist()))
            images = self.images[chosen]
            if self.poison_at == (epoch, step):
                images = images * float("nan")
            yield Batch(images.contiguous(memory_format=torch.channels_last), self.labels[chosen])

    def evaluate(self) -> Iterator[Batch]:
        mine = torch.arange(self.num_train, self.num_train + self.num_eval)[self.world.rank :: self.world.size]
        for part in mine.split(16):
            yield Batch(self.images[part], self.labels[part])

    def close(self) -> None:
        """Nothing to stop."""
