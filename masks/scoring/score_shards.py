"""How are scores and masks shared out over the ranks: each holds one slice of all prunable weights laid end to end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ghostmask.engine.errors import bad_value
from ghostmask.engine.sharding.shards import ranges_within
from ghostmask.engine.world import World
from ghostmask.masks.scoring.topk import kept_count, topk_shard


class ScoreShards:
    """This rank's slice [first, end) of the weights laid end to end in logical order.

        conv1.weight | layer1...weight |    ...    | fc.weight
        --- rank 0 ---|--- rank 1 ---|--- rank 2 ---|          equal lengths, the last one may be shorter

    Sums over the ranks are reduce-scattered into the slices; scores stay in them, and only the finished masks are
    gathered: every rank gets the same bits, because each bit was decided on one rank.
    """

    def __init__(self, weights: Mapping[str, Tensor], world: World) -> None:
        self.weights, self.world = weights, world
        self.total = sum(w.numel() for w in weights.values())
        self.length = -(-self.total // world.size)
        self.first = min(world.rank * self.length, self.total)
        self.end = min(self.first + self.length, self.total)

    def own(self, tensors: Iterable[Tensor]) -> Tensor:
        """This rank's slice, (end - first,), of tensors shaped like the weights and equal on every rank."""
        flat = [t.detach().reshape(-1) for t in tensors]
        parts = [t[low:high] for t, (low, high) in zip(flat, self._ranges(), strict=True)]
        return torch.cat(parts)

    def summed(self, tensors: Iterable[Tensor]) -> Tensor:
        """Collective: this rank's slice, (end - first,), of the sum over ranks of tensors shaped like the weights."""
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        padding = flat.new_zeros(self.length * self.world.size - self.total)
        return self.world.reduce_scatter(torch.cat([flat, padding]))[: self.end - self.first]

    def layers(self, shard: Tensor) -> Iterator[Tensor]:
        """The part of the shard, a view, that belongs to each weight in turn; empty where none does."""
        start = 0
        for low, high in self._ranges():
            yield shard[start : start + high - low]
            start += high - low

    def gathered(self, shard: Tensor) -> dict[str, Tensor]:
        """Collective: the whole masks by weight name, equal on every rank, from each rank's (end - first,) bools."""
        padded = torch.zeros(self.length, dtype=torch.uint8, device=shard.device)
        padded[: len(shard)] = shard
        flat = self.world.all_gather(padded).reshape(-1)[: self.total].bool()
        pieces = torch.split(flat, [w.numel() for w in self.weights.values()])
        return {n: p.view(w.shape) for (n, w), p in zip(self.weights.items(), pieces, strict=True)}

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """For each weight, the elements of it that lie in this rank's slice: [low, high), empty where low == high."""
        return ranges_within((w.numel() for w in self.weights.values()), self.first, self.end)


def largest(
    shards: ScoreShards, scores: Tensor, density: float, constraint: str, min_per_layer: int = 0,
    among: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Collective: this rank's bools, (end - first,): round(density n) largest scores of the network or of each layer.

    scores: (end - first,), larger = kept; constraint: "global" or "layerwise"; min_per_layer: with "global", that many
    of each layer's largest scores (all of a smaller layer) are kept before the others compete; among: bools, the only
    ones that may be kept (of each layer at least as many as are asked for). Raises InputError where min_per_layer is
    more than the budget.
    """
    among = torch.ones_like(scores, dtype=torch.bool) if among is None else among
    sizes = [w.numel() for w in shards.weights.values()]
    if constraint == "layerwise":
        return _largest_of_layers(shards, scores, among, [kept_count(density, size) for size in sizes])
    kept = kept_count(density, shards.total)
    if not min_per_layer:
        return _top(scores, among, kept, shards)
    smallest = [min(min_per_layer, size) for size in sizes]
    if sum(smallest) > kept:
        fix = f"{len(sizes)} layers need {sum(smallest)} weights, mask.density = {density:g} keeps {kept}"
        raise bad_value("mask.min_per_layer", min_per_layer, f"{fix}; lower the one or raise the other")
    protected = _largest_of_layers(shards, scores, among, smallest)
    return protected | _top(scores, among & ~protected, kept - sum(smallest), shards)


def _largest_of_layers(shards: ScoreShards, scores: Tensor, among: Tensor, counts: list[int]) -> Tensor:
    layers = zip(shards.layers(scores), shards.layers(among), counts, strict=True)
    return torch.cat([_top(part, candidates, count, shards) for part, candidates, count in layers])


def _top(scores: Tensor, among: Tensor, kept: int, shards: ScoreShards) -> Tensor:
    mask = torch.zeros_like(among)
    mask[among] = topk_shard(scores[among], kept, shards.world)
    return mask


def empty_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers whose mask keeps nothing: no signal passes them."""
    return [name for name, mask in masks.items() if not mask.any()]
