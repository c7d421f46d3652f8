"""Where does a ranking end, if what has a cost each may cost so much in all? A radix search over all ranks' scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.world import World
from ghostmask.masks.scoring.topk import hashed

DIGIT = 11
"""Bits per all-reduce, of 2^11 bins for each budget."""


@dataclass(frozen=True)
class Ranking:
    """What this rank ranks. scores: (m,) float32 or float64; places: (m,) int64, each one's index, whose hash with the
    seed decides between equal scores; costs: (m,) int64 >= 0; rows: (m,) int64, the number of each one's budget."""

    scores: Tensor
    places: Tensor
    costs: Tensor
    rows: Tensor
    seed: int

    def __getitem__(self, chosen: Tensor) -> Ranking:
        return Ranking(self.scores[chosen], self.places[chosen], self.costs[chosen], self.rows[chosen], self.seed)

    def hashes(self) -> Tensor:
        """(m,) int64."""
        return hashed(self.places, self.seed)


def ends(ranking: Ranking, budgets: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Collective: (images of scores, hashes), (budgets,) int64 each, from which `before` tells what stays.

    That is the longest beginning of each budget's ranking, by score and then by hash, whose costs over all ranks are
    within the budget. budgets: (rows,) int64. Exact, and the same bits on any number of ranks. Raises RunStopped for a
    nan score.
    """
    bad = world.all_reduce(ranking.scores.isnan().sum())
    if int(bad):
        raise RunStopped(f"{int(bad)} scores are nan", EXIT_NON_FINITE)
    bits = 32 if ranking.scores.dtype == torch.float32 else 64
    keys = images(ranking.scores)
    last, left = _descend(keys, ranking.costs, ranking.rows, budgets, bits, world)
    tied = ranking[keys == last[ranking.rows]]
    hashes, _ = _descend(tied.hashes(), tied.costs, tied.rows, left, 64, world)
    return last, hashes


def before(ranking: Ranking, found: tuple[Tensor, Tensor]) -> Tensor:
    """(m,) bools: what comes before the end of its budget's ranking."""
    last, hashes = found
    keys, ending = images(ranking.scores), last[ranking.rows]
    kept = keys > ending
    tied = (keys == ending).nonzero().squeeze(1)
    rest = ranking[tied]
    kept[tied] = rest.hashes() > hashes[rest.rows]
    return kept


def images(scores: Tensor) -> Tensor:
    """(m,) int64 that are ordered as the scores are, -0.0 as 0.0."""
    kind = torch.int32 if scores.dtype == torch.float32 else torch.int64
    bits = (scores + 0.0).view(kind)
    return torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits).long()


def _descend(keys: Tensor, costs: Tensor, rows: Tensor, left: Tensor, bits: int, world: World) -> tuple[Tensor, Tensor]:
    """Collective: (the largest key whose equals have no room together, below all keys where all have; what is left for
    them), (rows,) int64 each. keys: signed, of so many bits."""
    prefix, shift = torch.zeros_like(left), bits
    everything = torch.zeros_like(left, dtype=torch.bool)
    while shift:
        uppermost, size = shift == bits, min(DIGIT, shift)
        shift -= size
        offset = 1 << (size - 1) if uppermost else 0
        inside = slice(None) if uppermost else keys >> (shift + size) == prefix[rows]
        places = ((keys[inside] >> shift) + offset & (1 << size) - 1) + (rows[inside] << size)
        table = torch.zeros(len(left) << size, dtype=torch.int64, device=keys.device)
        table.index_add_(0, places, costs[inside])
        spent = world.all_reduce(table).view(len(left), -1).flip(1).cumsum(1)
        place = (spent <= left[:, None]).sum(1)
        if uppermost:
            everything = place == 1 << size
        place = place.clamp(max=(1 << size) - 1)
        left = left - torch.where(place > 0, spent.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0], 0)
        prefix = (prefix << size) + (1 << size) - 1 - place - offset
    return torch.where(everything, torch.iinfo(torch.int64).min, prefix), left
