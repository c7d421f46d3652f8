"""Who computes what of a step: the parts of the batch, the noise groups, and where ranks stand among them.

The global batch is always cut into V parts. A part is one forward pass: its own images, its own batch-norm statistics.
S noise samples are drawn per step; sample g belongs to the parts [g V / S, (g + 1) V / S). Both are settings of the
run; the number of ranks is not: R ranks do V / R neighbouring parts each, one after the other.

    V = 8, S = 2       parts    0   1   2   3 | 4   5   6   7        noise 0 | noise 1
    R = 4, two nodes   ranks    0   0   1   1 | 2   2   3   3        {0, 1} share the state of noise 0: one node
    R = 1              rank     0   0   0   0   0   0   0   0        noise 0, then noise 1

Ranks with the same noise form a group: the state is sharded inside it and replicated across groups. Ranks are numbered
node by node for this, in whatever order the launcher has placed them: a group lies within a node where S allows it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ghostmask.engine.data import Parts
from ghostmask.engine.sharding.ranks import check_ranks
from ghostmask.engine.world import World


@dataclass(frozen=True)
class Cycle:
    """One gather and one reduction: noise `sample` of the step, and the forward passes done with it, by this rank's own
    numbering of its parts."""

    sample: int
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Replicas:
    """This rank's share of every step.

    parts: those it computes; noises: S; inner: the ranks with its noise, over which the state is sharded; order: these
    in the order of their parts; across: the ranks of the groups that hold the same slices, None where there is one
    group; across_order: these in the order of their noise.
    """

    parts: Parts
    noises: int
    inner: World
    order: tuple[int, ...]
    across: World | None
    across_order: tuple[int, ...] = (0,)

    def cycles(self, passes: int) -> list[Cycle]:
        """What this rank does in a step: for each of its noise groups, `passes` noise samples (I)."""
        per_noise = self.parts.total // self.noises
        first = self.parts.first // per_noise
        count = max(1, self.parts.count // per_noise)
        width = self.parts.count // count
        return [
            Cycle((first + n) * passes + i, tuple(range(n * width, (n + 1) * width)))
            for n in range(count)
            for i in range(passes)
        ]


def share(world: World, parts: int, noises: int = 1, node: str | None = None) -> Replicas:
    """Collective: this rank's share. node: this machine's name (default: the kernel's). Raises InputError as
    check_ranks."""
    check_ranks(parts, noises, world.size)
    places = _places(world, node or os.uname().nodename)
    place = places.index(world.rank)
    count = parts // world.size
    own = Parts(parts, place * count, count)
    groups = min(noises, world.size)
    if groups == 1:
        return Replicas(own, noises, world, tuple(places), None)
    size = world.size // groups
    inner = [_subset(world, places[g * size : (g + 1) * size]) for g in range(groups)]
    across = [_subset(world, [places[g * size + i] for g in range(groups)]) for i in range(size)]
    mine, beside = inner[place // size], across[place % size]
    assert mine is not None
    assert beside is not None
    members, others = places[place // size * size : (place // size + 1) * size], places[place % size :: size]
    return Replicas(own, noises, mine, _ranks_within(members), beside, _ranks_within(others))


def _places(world: World, node: str) -> list[int]:
    """The ranks node by node, the node of the lowest rank first."""
    nodes = world.all_gather_object(node)
    first = {name: nodes.index(name) for name in nodes}
    return sorted(range(world.size), key=lambda rank: (first[nodes[rank]], rank))


def _ranks_within(ranks: list[int]) -> tuple[int, ...]:
    """Of each, its rank in the group that they form."""
    return tuple(sorted(ranks).index(rank) for rank in ranks)


def _subset(world: World, ranks: list[int]) -> World | None:
    """Collective over all ranks: the world of some of them; None on the others."""
    ordered = sorted(ranks)
    group: Any = dist.new_group(ordered)
    if world.rank not in ranks:
        return None
    return World(ordered.index(world.rank), len(ranks), world.device, group)
