"""Which training images does a score see? The same ones, in the same chunks, for every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.world import World


@dataclass(frozen=True)
class Chunk:
    """This rank's part of one chunk: images (n, C, H, W) contiguous, labels (n,), n may differ between ranks and be 0.

    numbers: (n,) int64, on the CPU, ascending: the images' places among all chosen ones; they say which image it is on
    any number of ranks.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor


class Choice:
    """The first `count` images of an epoch, or those of each class; fewer where the epoch holds fewer."""

    def __init__(self, count: int, num_classes: int | None = None) -> None:
        """num_classes: None = whatever their classes are."""
        self.left = [count] * (num_classes or 1)
        self.per_class = num_classes is not None

    def take(self, label: int) -> bool:
        """Whether the next image of the epoch, of class `label`, is chosen."""
        kind = label if self.per_class else 0
        self.left[kind] -= 1
        return self.left[kind] >= 0

    def done(self) -> bool:
        """Whether no further image will be."""
        return max(self.left) <= 0


def chosen_images(data: DataPipeline, choice: Choice, size: int, world: World) -> Iterator[Chunk]:
    """Collective: the images of epoch 0 that `choice` takes, in chunks of `size` over all ranks (the last: the rest).

    Each rank keeps those that the loader gives it, as many chunks on every rank; at most a chunk and a batch of images
    are held at once. Images are chosen, numbered and cut into chunks in the order of the global batches, whichever rank
    has which parts of them.
    """
    places = _places(data)
    everywhere = world.all_gather(places).reshape(-1)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    numbers: list[Tensor] = []
    count = sent = 0
    with closing(data.train(0)) as batches:
        for batch in batches:
            if choice.done():
                break
            gathered = world.all_gather(batch.labels).reshape(-1).cpu()
            everyone = torch.empty_like(gathered).index_copy_(0, everywhere, gathered).tolist()
            taken = torch.tensor([choice.take(label) for label in everyone])
            # Of this rank's images those that are taken, in the order of the global batch.
            mine = places.argsort()
            mine = mine[taken[places[mine]]]
            images.append(batch.images[mine].contiguous(memory_format=torch.contiguous_format))
            labels.append(batch.labels[mine])
            numbers.append((count + taken.cumsum(0) - 1)[places[mine]])
            count += int(taken.sum())
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


def _places(data: DataPipeline) -> Tensor:
    """(this rank's images of a global batch,) int64: the place in the global batch of each, in the rank's order."""
    parts = data.parts
    of_parts = torch.arange(data.batch_size).view(-1, parts.total).T
    return of_parts[parts.first : parts.first + parts.count].reshape(-1)


def _between(chunk: Chunk, low: int, high: int) -> Chunk:
    inside = (chunk.numbers >= low) & (chunk.numbers < high)
    return Chunk(chunk.images[inside], chunk.labels[inside], chunk.numbers[inside])
