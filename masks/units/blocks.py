"""Which kernels stay, or which weights if each costs what an image uses of it; and which weights of every N:M block?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped, bad_value
from ghostmask.engine.sharding.neighbours import with_neighbours
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.scoring.radix import on_host
from ghostmask.masks.scoring.topk import Budget, hashed, kept_count
from ghostmask.masks.units.parts import unit_sums, with_whole_units
from ghostmask.masks.units.prefix import Ranking, before, ends
from ghostmask.masks.units.shares import layer_shares


@dataclass(frozen=True)
class Kernels:
    """Units of neighbouring weights, in the order of their mean score: as many as the budget has room for.

    lengths: by weight name a unit's weights, 1 or those of a kernel (between one input and one output channel); uses:
    how often an image uses each, None = once. A unit costs both multiplied. What stays costs at most round(density x
    cost of all), and with the next unit it would cost more.
    """

    lengths: Mapping[str, int]
    uses: Mapping[str, int] | None
    by_layer: bool = True
    """Whether scores of kernels are compared in shares of their layer's mean (see `shares`)."""

    def largest(
        self, part: Slice, scores: Tensor, budget: Budget, among: Tensor | None = None, *, wait: bool = True
    ) -> Tensor:
        """Collective: see `masks.scoring.topk.largest`."""
        if self.by_layer and max(self.lengths.values()) > 1:
            scores = layer_shares(part, scores, among)
        if among is not None:
            scores = torch.where(among, scores, -torch.inf)
        ranking, owned, sizes = self._ranking(part, scores, budget.seed)
        wholes = [cost * number for cost, number in self.costs(part)]
        if budget.constraint == "layerwise":
            kept = self._within(ranking, owned, [kept_count(budget.density, whole) for whole in wholes], part)
        else:
            allowed = kept_count(budget.density, sum(wholes))
            kept = self._protected(ranking, owned, budget, allowed, part)
            spent = part.world.all_reduce(torch.where(kept & owned, ranking.costs, 0).sum())
            rest = Ranking(
                torch.where(kept, -torch.inf, ranking.scores), ranking.places, torch.where(kept, 0, ranking.costs),
                torch.zeros_like(ranking.rows), ranking.seed,
            )  # fmt: skip
            kept = kept | self._within(rest, owned, [allowed - int(spent)], part)
        mask = kept.repeat_interleave(sizes, output_size=part.numel)
        return mask if among is None else mask & among

    def largest_of_layers(
        self, part: Slice, scores: Tensor, counts: Sequence[int], seed: int, among: Tensor | None = None
    ) -> Tensor:
        """Collective: see `masks.scoring.topk.largest_of_layers`; counts: units."""
        if among is not None:
            scores = torch.where(among, scores, -torch.inf)
        ranking, owned, sizes = self._ranking(part, scores, seed)
        budgets = [cost * count for (cost, _), count in zip(self.costs(part), counts, strict=True)]
        mask = self._within(ranking, owned, budgets, part).repeat_interleave(sizes, output_size=part.numel)
        return mask if among is None else mask & among

    def _protected(self, ranking: Ranking, owned: Tensor, budget: Budget, allowed: int, part: Slice) -> Tensor:
        """The min_per_layer first units of each layer. Raises InputError where they cost more than is allowed."""
        if not budget.min_per_layer:
            return torch.zeros_like(ranking.rows, dtype=torch.bool)
        counts = [min(budget.min_per_layer, number) for _, number in self.costs(part)]
        needed = sum(cost * count for (cost, _), count in zip(self.costs(part), counts, strict=True))
        if needed > allowed:
            fix = f"they cost {needed}, mask.density = {budget.density:g} allows {allowed}; lower it or raise that"
            raise bad_value("mask.min_per_layer", budget.min_per_layer, fix)
        once = Ranking(ranking.scores, ranking.places, torch.ones_like(ranking.costs), ranking.rows, ranking.seed)
        return self._within(once, owned, counts, part)

    def _within(self, ranking: Ranking, owned: Tensor, budgets: list[int], part: Slice) -> Tensor:
        allowed = torch.tensor(budgets, device=ranking.costs.device)
        return before(ranking, ends(ranking[owned], allowed, part.world))

    def numbers(self, weights: Sequence[int]) -> list[int]:
        """How many units so many weights of each layer are."""
        return [count // length for count, length in zip(weights, self.lengths.values(), strict=True)]

    def costs(self, part: Slice) -> list[tuple[int, int]]:
        """Of each layer: what a unit costs, and how many there are."""
        lengths = [self.lengths[name] for name in part.names]
        uses = [1 if self.uses is None else self.uses.get(name, 0) for name in part.names]
        numbers = [n // length for n, length in zip(part.layout.numels, lengths, strict=True)]
        return [(length * use, n) for length, use, n in zip(lengths, uses, numbers, strict=True)]

    def _ranking(self, part: Slice, scores: Tensor, seed: int) -> tuple[Ranking, Tensor, Tensor]:
        """Collective: (m,) each of the units that this slice has any weight of: as a ranking by layers, whether their
        first weight is here, and how many are."""
        costs, found = [cost for cost, _ in self.costs(part)], []
        for x, rows in with_whole_units(part, scores, self.lengths):
            units = torch.arange(x.first, x.first + x.count, device=scores.device)
            row = torch.full_like(units, x.segment.layer)
            own = torch.ones_like(units, dtype=torch.bool)
            own[: x.cut] = False
            begins, end = units * x.length, x.segment.offset + x.segment.numel
            inside = (begins + x.length).clamp(max=end) - begins.clamp(min=x.segment.offset)
            found.append(
                (_means(rows), x.begin + begins, torch.full_like(units, costs[x.segment.layer]), row, own, inside)
            )
        if not found:
            nothing = torch.zeros(0, dtype=torch.int64, device=scores.device)
            found.append((scores[:0], nothing, nothing, nothing, nothing.bool(), nothing))
        means, places, each, rows, owned, sizes = (torch.cat(column) for column in zip(*found, strict=True))
        return Ranking(means, places, each, rows, seed), owned, sizes


@dataclass(frozen=True)
class Blocks:
    """N:M: of every M neighbouring input channels, at each place of the kernel, the N largest scores stay.

    The last block of a row may have fewer than M: then as many of it stay, at most N. A layer with one input channel
    per output (depthwise) so stays dense. At a density above N / M, where a schedule begins, it is ceil(density M): M.
    """

    kept: int
    of: int

    def budget(self, seed: int) -> Budget:
        """N of each block; seed: of ties."""
        return Budget(self.kept / self.of, seed=seed, units=self)

    def largest(
        self, part: Slice, scores: Tensor, budget: Budget, among: Tensor | None = None, *, wait: bool = True
    ) -> Tensor:
        """Collective: see `masks.scoring.topk.largest`. constraint and min_per_layer mean nothing here."""
        if wait or on_host(scores.device):
            bad = part.world.all_reduce(scores.isnan().sum())
            if int(bad):
                raise RunStopped(f"{int(bad)} of {part.total} scores are nan", EXIT_NON_FINITE)
        if among is not None:
            scores = torch.where(among, scores, -torch.inf)
        number = max(self.kept, math.ceil(budget.density * self.of - 1e-9))
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for where, wide, low, block in self._blocks(part, scores):
            own = block.own(wide)
            ranks = torch.zeros(own.shape, dtype=torch.uint8, device=own.device)
            equal = torch.zeros_like(ranks)
            for place in range(self.of):
                other = block.member(wide, place)
                ranks += other > own
                equal += other == own
            if not (block.whole and on_host(own.device) and int(equal.max()) == 1):  # with itself alone
                hashes = hashed(torch.arange(low, low + len(wide), device=own.device), budget.seed)
                for place in range(self.of):
                    ahead = block.member(hashes, place) > block.own(hashes)
                    ranks += (block.member(wide, place) == own) & ahead
            mask[where] = ranks < number
        return mask if among is None else mask & among

    def pruned(self, part: Slice, scores: Tensor, mask: Tensor) -> Tensor:
        """Collective: (n,) for each weight the largest score (at least 0) that the mask prunes in its block, or 0."""
        out = torch.zeros_like(scores)
        for where, wide, _, block in self._blocks(part, torch.where(mask, 0.0, scores)):
            for place in range(self.of):
                torch.maximum(out[where], block.member(wide, place), out=out[where])
        return out

    def counts(self, shapes: Sequence[torch.Size]) -> list[int]:
        """How many weights of layers of these shapes stay, N of each block."""
        whole, rest = zip(*(divmod(shape[1], self.of) for shape in shapes), strict=True)
        columns = [self.kept * w + min(self.kept, r) for w, r in zip(whole, rest, strict=True)]
        return [shape.numel() // shape[1] * c for shape, c in zip(shapes, columns, strict=True)]

    def _blocks(self, part: Slice, values: Tensor) -> Iterator[tuple[slice, Tensor, int, _Segment]]:
        """Collective: of each segment: where it lies in the slice; values, of (n,), of it and its neighbours, and the
        index in the group of the first of these; its blocks."""
        reach = self.of * max(shape[2:].numel() for shape in part.layout.shapes.values()) - 1
        for run, wide, low in with_neighbours(part, values, reach):
            for s in (s for s in part.segments if run.start <= s.start < run.start + run.numel):
                inputs, places = part.layout.shapes[s.name][1], part.layout.shapes[s.name][2:].numel()
                begin = run.first + s.start - run.start - s.offset - low
                yield (
                    slice(s.start, s.start + s.numel), wide, low,
                    _Segment(s.offset, s.numel, begin, inputs, places, self.of),
                )  # fmt: skip


@dataclass(frozen=True)
class _Segment:
    """`numel` elements from `offset` on of a layer whose first one lies at `begin` of tensors that hold at least all
    blocks of theirs; places: of a kernel."""

    offset: int
    numel: int
    begin: int
    inputs: int
    places: int
    of: int

    @property
    def whole(self) -> bool:
        """Whether all blocks of the layer have M weights: they are then columns of matrices that lie end to end."""
        return self.inputs % self.of == 0

    def own(self, values: Tensor) -> Tensor:
        """(numel,) of its elements: a view."""
        return values[self.begin + self.offset : self.begin + self.offset + self.numel]

    def member(self, values: Tensor, place: int) -> Tensor:
        """(numel,) for each element that of its block's weight number `place`, or its own where there is none."""
        if not self.whole:
            element = torch.arange(self.offset, self.offset + self.numel, device=values.device)
            channel = element // self.places % self.inputs
            there = (channel % self.of - place) * self.places
            missing = channel - channel % self.of + place >= self.inputs
            return values[self.begin + torch.where(missing, element, element - there)]
        size = self.of * self.places
        first, end = self.offset // size * size, -(-(self.offset + self.numel) // size) * size
        table = values[self.begin + first : self.begin + end].view(-1, self.of, self.places)
        spread = table[:, place : place + 1].expand_as(table).reshape(-1)
        return spread[self.offset - first : self.offset - first + self.numel]


def _means(rows: Tensor) -> Tensor:
    """(m,) in the type of the values, of (m, length)."""
    if rows.shape[1] == 1:
        return rows[:, 0]
    return (unit_sums(rows) / rows.shape[1]).to(rows.dtype)
