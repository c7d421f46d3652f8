"""Which weights of a network have the largest scores: over all layers, in each layer, or with a few of each kept safe.

Scores lie in slices (`engine.sharding.slices`): each rank scores and decides its own elements, and over all ranks
exactly as many are kept as are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ghostmask.engine.errors import bad_value
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.scoring.radix import INTEGERS, Piece, largest_keys, score_keys


@dataclass(frozen=True)
class Budget:
    """How many weights stay, and where.

    density: in (0, 1], round(density n) weights; constraint: "global" (of the whole network) or "layerwise" (of each
    layer); min_per_layer: with "global", that many of each layer's largest (all of a smaller layer) stay before the
    others compete; seed: decides between equal scores, by a hash of the weight's index. units: what stays or goes as
    one, and what it costs, where that is not each weight by itself (mask.granularity, mask.budget).
    """

    density: float
    constraint: str = "global"
    min_per_layer: int = 0
    seed: int = 0
    units: Units | None = None

    def counts(self, sizes: Sequence[int]) -> list[int] | None:
        """How many of layers of these sizes stay: (one number) in all, or of each layer where it has its own budget;
        None with units, of which as many stay as there is room for."""
        if self.units is not None:
            return None
        if self.constraint == "layerwise":
            return [kept_count(self.density, size) for size in sizes]
        return [kept_count(self.density, sum(sizes))]


class Units(Protocol):
    """What stays or goes as one: see masks.granularity."""

    def largest(
        self, part: Slice, scores: Tensor, budget: Budget, among: Tensor | None = None, *, wait: bool = True
    ) -> Tensor:
        """Collective: as the function of that name; as many units as the budget has room for, in the order of their
        scores."""
        ...


def largest(part: Slice, scores: Tensor, budget: Budget, among: Tensor | None = None, *, wait: bool = True) -> Tensor:
    """Collective: this rank's bools, (n,): the largest scores that the budget allows, exactly as many on all ranks.

    scores: (n,), larger = kept; other types than float32 and float64 are rounded to float32. -0.0 equals 0.0, and
    infinities are ordinary scores. among: bools, the only ones that may be kept (of each layer at least as many as are
    asked for). wait: False in a training step on a device, where a nan is then kept and not looked for. All layers are
    cut in the same few all-reduces (see `radix`), with the same result for every number of ranks. Raises InputError
    where min_per_layer is more than the budget, RunStopped where a score is nan.
    """
    if budget.units is not None:
        return budget.units.largest(part, scores, budget, among, wait=wait)
    scores = scores.detach() if scores.dtype in INTEGERS else scores.detach().float()
    sizes, kept = part.layout.numels, kept_count(budget.density, part.total)
    keys = score_keys(scores.contiguous(), among, part.world, wait=wait)
    layers = [Piece(s.layer, s.start, s.numel) for s in part.segments]

    def ties(places: Tensor | None) -> Tensor:
        return hashed(part.indices(places), budget.seed)

    if budget.constraint == "layerwise":
        return largest_keys(keys, layers, [kept_count(budget.density, size) for size in sizes], ties, part.world)
    whole = [Piece(0, 0, part.numel)]
    if not budget.min_per_layer:
        return largest_keys(keys, whole, [kept], ties, part.world)
    safe = protected_counts(sizes, budget.min_per_layer, budget.density)
    mask = largest_keys(keys, layers, safe, ties, part.world)
    keys = torch.where(mask, torch.iinfo(keys.dtype).min, keys)
    return mask | largest_keys(keys, whole, [kept - sum(safe)], ties, part.world)


def largest_of_layers(
    part: Slice, scores: Tensor, counts: Sequence[int], seed: int, among: Tensor | None = None
) -> Tensor:
    """Collective: as `largest`, for a number of weights to keep of each layer that is given."""
    keys = score_keys(scores.detach().contiguous(), among, part.world, wait=True)
    layers = [Piece(s.layer, s.start, s.numel) for s in part.segments]
    return largest_keys(keys, layers, counts, lambda places: hashed(part.indices(places), seed), part.world)


def empty_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers whose mask keeps nothing: no signal passes them."""
    return [name for name, mask in masks.items() if not mask.any()]


def kept_count(density: float, prunable: int) -> int:
    """Number of weights kept of `prunable` at `density` in (0, 1]: round(density * prunable), at least 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density = {density}: give a number in (0, 1]")
    return max(1, round(density * prunable))


def protected_counts(
    sizes: Sequence[int], min_per_layer: int, density: float, lengths: Sequence[int] | None = None
) -> list[int]:
    """How many weights of each layer min_per_layer saves, of weights or of units of so many weights; InputError where
    these are more than the density keeps."""
    each = zip(sizes, lengths or [1] * len(sizes), strict=True)
    counts, kept = [min(min_per_layer * length, size) for size, length in each], kept_count(density, sum(sizes))
    if sum(counts) > kept:
        fix = f"{len(sizes)} layers need {sum(counts)} weights, mask.density = {density:g} keeps {kept}"
        raise bad_value("mask.min_per_layer", min_per_layer, f"{fix}; lower the one or raise the other")
    return counts


def hashed(indices: Tensor, seed: int) -> Tensor:
    """(m,) int64: a hash of each index and the seed, different for all indices."""
    x = indices + (seed * 0x632BE59B + 0x51ED270B)
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (multiplier - (1 << 64))
    # Flipping the sign turns the order of unsigned numbers into that of signed ones.
    return x ^ ((x >> 31) & ((1 << 33) - 1)) ^ torch.iinfo(torch.int64).min
