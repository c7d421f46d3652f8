"""Which training images does a score see? The same ones, in the same chunks, for every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.world import World


@dataclass(frozen=True)
class Chunk:
    """This rank's part of one chunk: images (n, C, H, W) contiguous, labels (n,), n may differ between ranks and be 0.

    numbers: (n,) int64, the images' places among all chosen ones; they say which image it is on any number of ranks.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor


class Choice(Protocol):
    """Says image by image, in the order of an epoch, whether the score sees it."""

    def take(self, label: int) -> bool:
        """Whether the next image, of class `label`, is chosen."""
        ...

    def done(self) -> bool:
        """Whether no further image will be."""
        ...


class First:
    """The first `count` images of the epoch."""

    def __init__(self, count: int) -> None:
        self.left = count

    def take(self, label: int) -> bool:
        """True `count` times."""
        self.left -= 1
        return self.left >= 0

    def done(self) -> bool:
        """After `count` images."""
        return self.left <= 0


class PerClass:
    """The first `count` images of each class in the epoch; fewer where the epoch holds fewer."""

    def __init__(self, num_classes: int, count: int) -> None:
        self.left = dict.fromkeys(range(num_classes), count)
        self.missing = num_classes * count

    def take(self, label: int) -> bool:
        """True `count` times for each class."""
        wanted = self.left[label] > 0
        self.left[label] -= wanted
        self.missing -= wanted
        return wanted

    def done(self) -> bool:
        """When every class has its images."""
        return self.missing <= 0


def chosen_images(data: DataPipeline, epoch: int, choice: Choice, size: int, world: World) -> Iterator[Chunk]:
    """Collective: the images of `epoch` that `choice` takes, in chunks of `size` over all ranks (the last: the rest).

    Each rank keeps those that the loader gives it, as many chunks on every rank; at most a chunk and a batch of images
    are held at once.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    numbers: list[Tensor] = []
    count = sent = 0
    with closing(data.train(epoch)) as batches:
        for batch in batches:
            if choice.done():
                break
            everyone = world.all_gather(batch.labels).T.reshape(-1).tolist()
            taken = torch.tensor([choice.take(label) for label in everyone])
            places = (count + taken.cumsum(0) - 1)[world.rank :: world.size]
            mine = taken[world.rank :: world.size]
            count += int(taken.sum())
            images.append(batch.images[mine].contiguous(memory_format=torch.contiguous_format))
            labels.append(batch.labels[mine])
            numbers.append(places[mine])
            if count - sent < size:
                continue
            held = Chunk(torch.cat(images), torch.cat(labels), torch.cat(numbers))
            while count - sent >= size:
                yield _between(held, sent, sent + size)
                sent += size
            rest = _between(held, sent, count)
            images, labels, numbers = [rest.images], [rest.labels], [rest.numbers]
    if count > sent:
        yield Chunk(torch.cat(images), torch.cat(labels), torch.cat(numbers))


def _between(chunk: Chunk, low: int, high: int) -> Chunk:
    inside = (chunk.numbers >= low) & (chunk.numbers < high)
    return Chunk(chunk.images[inside], chunk.labels[inside], chunk.numbers[inside])
