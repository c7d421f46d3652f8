"""Which training images does a score see? The same ones, in the same chunks, for every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields

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


def chosen_images(
    data: DataPipeline, number: int, size: int, world: World, *, per_class: bool = False
) -> Iterator[Chunk]:
    """Collective: the first `number` images of epoch 0, or that many of each class, in chunks of `size` over all ranks.

    Fewer where the epoch holds fewer; the last chunk has the rest.

    Each rank keeps those that the loader gives it, as many chunks on every rank; at most a chunk and a batch of images
    are held at once. Images are chosen, numbered and cut into chunks in the order of the global batches, whichever rank
    has which parts of them.
    """
    parts = data.parts
    of_parts = torch.arange(data.batch_size).view(-1, parts.total).T
    places = of_parts[parts.first : parts.first + parts.count].reshape(-1)  # of this rank's images in a global batch
    everywhere = world.all_gather(places).reshape(-1)
    held: list[Chunk] = []
    left = [number] * (data.num_classes if per_class else 1)
    count = sent = 0
    with closing(data.train(0)) as batches:
        for batch in batches:
            if max(left) <= 0:
                break
            gathered = world.all_gather(batch.labels).reshape(-1).cpu()
            everyone = torch.empty_like(gathered).index_copy_(0, everywhere, gathered)
            chosen = []
            for kind in everyone.tolist() if per_class else [0] * len(everyone):
                chosen.append(left[kind] > 0)
                left[kind] -= 1
            taken = torch.tensor(chosen)
            # Of this rank's images those that are taken, in the order of the global batch.
            mine = places.argsort()
            mine = mine[taken[places[mine]]]
            images = batch.images[mine].contiguous(memory_format=torch.contiguous_format)
            held.append(Chunk(images, batch.labels[mine], (count + taken.cumsum(0) - 1)[places[mine]]))
            count += int(taken.sum())
            while count - sent >= size:
                yield _between(held, sent, sent + size)
                sent += size
            held = [_between(held, sent, count)]
    if count > sent:
        yield held[0]


def _between(held: list[Chunk], low: int, high: int) -> Chunk:
    inside = [(chunk.numbers >= low) & (chunk.numbers < high) for chunk in held]
    names = [field.name for field in fields(Chunk)]
    return Chunk(*(torch.cat([getattr(c, name)[i] for c, i in zip(held, inside, strict=True)]) for name in names))
