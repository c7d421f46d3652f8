"""Which units of neighbouring weights (kernels) does a rank's slice hold any weight of? The first one's and the last
one's other weights may lie on other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.sharding.neighbours import with_neighbours
from ghostmask.engine.sharding.slices import Run, Segment, Slice


@dataclass(frozen=True)
class Part:
    """Of one layer: `count` units of `length` weights, of which the segment's elements are those from place `head` on.

    first: number of the first unit in its layer; begin: index in the group of the layer's first weight.
    """

    segment: Segment
    length: int
    begin: int

    @property
    def head(self) -> int:
        return self.segment.offset % self.length

    @property
    def first(self) -> int:
        return self.segment.offset // self.length

    @property
    def count(self) -> int:
        return -(-(self.head + self.segment.numel) // self.length)

    @property
    def cut(self) -> int:
        """How many of the units, 0 or 1, begin before the segment: another rank owns it."""
        return int(self.head > 0)

    @property
    def number(self) -> int:
        """Of the first unit in the group: those of a layer follow each other from the index of its first weight on."""
        return self.begin + self.first

    def of(self, values: Tensor) -> Tensor:
        """This segment's elements of (n,): a view."""
        return values[self.segment.start : self.segment.start + self.segment.numel]

    def owned(self, values: Tensor) -> Tensor:
        """(count - cut,) of (n,): the first element of each unit that begins here: a view."""
        return self.of(values)[-self.segment.offset % self.length :: self.length]

    def each(self, values: Tensor) -> Tensor:
        """(count,) of (n,) with equal values in each unit."""
        own = self.of(values)
        if self.length == 1:
            return own
        return own[(torch.arange(self.count, device=own.device) * self.length - self.head).clamp(min=0)]

    def spread(self, values: Tensor) -> Tensor:
        """(numel of the segment,): for each element the value, of (count,), of its unit."""
        if self.length == 1:
            return values
        return values.repeat_interleave(self.length)[self.head : self.head + self.segment.numel]


def parts_of(part: Slice, lengths: Mapping[str, int], runs: list[Run] | None = None) -> Iterator[Part]:
    """What this slice (or these runs of it) holds; lengths: of the units, by parameter name."""
    for run in part.runs if runs is None else runs:
        for s in (s for s in part.segments if run.start <= s.start < run.start + run.numel):
            yield Part(s, lengths[s.name], run.first + s.start - run.start - s.offset)


def with_whole_units(part: Slice, values: Tensor, lengths: Mapping[str, int]) -> Iterator[tuple[Part, Tensor]]:
    """Collective: each part with (count, length) the values, (n,) on this rank, of all weights of its units."""
    for run, wide, low in with_neighbours(part, values, max(lengths.values()) - 1):
        for x in parts_of(part, lengths, [run]):
            at = x.begin + x.first * x.length - low
            yield x, wide[at : at + x.count * x.length].view(-1, x.length)


def unit_sums(rows: Tensor) -> Tensor:
    """(m,) float64 of (m, length): added up in one order."""
    total = rows[:, 0].double()
    for column in rows.unbind(1)[1:]:
        total = total + column.double()
    return total
