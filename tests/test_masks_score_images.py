"""Does a score see the same images, in the same chunks, on every number of ranks and however they share the parts?"""

from __future__ import annotations

import pytest
import torch
from memory_data import MemoryData
from torch import Tensor

from ghostmask.engine.data import Batch, Parts
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.scoring.score_images import Chunk, chosen_images

PARTS = 4
NUMBERS = {"first": 50, "per class": 7}


def test_images_are_chosen_in_the_order_of_the_epoch_and_numbered() -> None:
    data = MemoryData(single())
    everything: list[Batch] = list(data.train(0))
    found = list(chosen_images(data, 50, 20, single()))
    assert [len(c.labels) for c in found] == [20, 20, 10]
    assert torch.cat([c.numbers for c in found]).tolist() == list(range(50))
    assert torch.equal(torch.cat([c.images for c in found]), torch.cat([b.images for b in everything])[:50])
    assert len(list(chosen_images(data, 10**6, 96, single()))) == 1, "one epoch holds no more"


def shared(world: World, choice: str, backwards: bool) -> list[Chunk]:
    """The chunks of one rank; backwards: the first rank has the last parts."""
    count = PARTS // world.size
    place = world.size - 1 - world.rank if backwards else world.rank
    data = MemoryData(world, parts=Parts(PARTS, place * count, count))
    return list(chosen_images(data, NUMBERS[choice], 15, world, per_class=choice == "per class"))


@pytest.mark.parametrize("choice", list(NUMBERS))
def test_ranks_find_the_images_of_one_rank_in_the_same_chunks(choice: str) -> None:
    alone = shared(single(), choice, False)
    assert [len(chunk.labels) for chunk in alone] == ([15, 15, 15, 5] if choice == "first" else [15, 13])
    for size, backwards in ((1, False), (2, False), (2, True), (4, True)):
        ranks = run_distributed(shared, size, choice, backwards)
        assert all(len(rank) == len(alone) for rank in ranks)
        for expected, *pieces in zip(alone, *ranks, strict=True):
            assert all(piece.numbers.tolist() == sorted(piece.numbers.tolist()) for piece in pieces)
            assert_same(expected, pieces)


def assert_same(expected: Chunk, pieces: list[Chunk]) -> None:
    numbers = torch.cat([piece.numbers for piece in pieces])
    order = numbers.argsort()
    assert torch.equal(numbers[order], expected.numbers)

    def together(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    assert torch.equal(together([piece.labels for piece in pieces]), expected.labels)
    assert torch.equal(together([piece.images for piece in pieces]), expected.images)
