"""Which weights of a network have the largest scores: over all layers, in each layer, or with a few of each kept safe.

Scores lie in slices (`engine.sharding.slices`): each rank scores and decides its own elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.errors import bad_value
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.scoring.topk import kept_count, seeded_order, topk_shard


@dataclass(frozen=True)
class Budget:
    """How many weights stay, and where.

    density: in (0, 1], round(density n) weights; constraint: "global" (of the whole network) or "layerwise" (of each
    layer); min_per_layer: with "global", that many of each layer's largest (all of a smaller layer) stay before the
    others compete; seed: decides between equal scores, by a hash of the weight's index.
    """

    density: float
    constraint: str = "global"
    min_per_layer: int = 0
    seed: int = 0


def largest(part: Slice, scores: Tensor, budget: Budget, among: Tensor | None = None) -> Tensor:
    """Collective: this rank's bools, (n,): the largest scores that the budget allows, exactly as many on all ranks.

    scores: (n,), larger = kept; among: bools, the only ones that may be kept (of each layer at least as many as are
    asked for). Raises InputError where min_per_layer is more than the budget.
    """
    among = torch.ones_like(scores, dtype=torch.bool) if among is None else among
    sizes = part.layout.numels
    if budget.constraint == "layerwise":
        counts = [kept_count(budget.density, size) for size in sizes]
        return _largest_of_layers(part, scores, among, counts, budget.seed)
    kept = kept_count(budget.density, part.total)
    if not budget.min_per_layer:
        return _top(part, scores, among, kept, budget.seed)
    smallest = [min(budget.min_per_layer, size) for size in sizes]
    if sum(smallest) > kept:
        fix = f"{len(sizes)} layers need {sum(smallest)} weights, mask.density = {budget.density:g} keeps {kept}"
        raise bad_value("mask.min_per_layer", budget.min_per_layer, f"{fix}; lower the one or raise the other")
    protected = _largest_of_layers(part, scores, among, smallest, budget.seed)
    return protected | _top(part, scores, among & ~protected, kept - sum(smallest), budget.seed)


def empty_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers whose mask keeps nothing: no signal passes them."""
    return [name for name, mask in masks.items() if not mask.any()]


def _largest_of_layers(part: Slice, scores: Tensor, among: Tensor, counts: list[int], seed: int) -> Tensor:
    mask = torch.zeros_like(among)
    for number, count in enumerate(counts):
        ranges = [torch.arange(s.start, s.start + s.numel) for s in part.segments if s.layer == number]
        places = torch.cat([torch.zeros(0, dtype=torch.int64), *ranges]).to(scores.device)
        chosen = places[among[places]]
        mask[chosen] = _among(part, scores, chosen, count, seed)
    return mask


def _top(part: Slice, scores: Tensor, among: Tensor, kept: int, seed: int) -> Tensor:
    if bool(among.all()):
        return topk_shard(scores, kept, part.world, lambda tied: seeded_order(part.indices()[tied], seed))
    places = among.nonzero().squeeze(1)
    mask = torch.zeros_like(among)
    mask[places] = _among(part, scores, places, kept, seed)
    return mask


def _among(part: Slice, scores: Tensor, places: Tensor, kept: int, seed: int) -> Tensor:
    """(len(places),) bools: the `kept` largest scores of all ranks' places."""
    return topk_shard(scores[places], kept, part.world, lambda tied: seeded_order(part.indices()[places[tied]], seed))
