"""What is summed over neighbouring elements of a group, such as a layer's or an output channel's: the same bits on any
number of ranks, wherever the slices are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.engine.sharding.slices import Slice

CHUNKS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements that are in float64 at a time, by device: they stay in a CPU's cache, and few kernels are launched."""
BITS = 2.0**34
"""Integers per largest value: 2^29 elements of a span can be added up."""


@dataclass(frozen=True)
class _Piece:
    """`rows` spans from number `number` on, or a part of one (rows = 1): elements `start`, ... of the slice."""

    start: int
    rows: int
    length: int
    number: int


class Spans:
    """A group's elements in spans: each parameter cut, as it lies in memory, into spans of one length.

    Spans are numbered through the group, parameter after parameter; `count` of them on every rank.
    """

    def __init__(self, part: Slice, lengths: Sequence[int]) -> None:
        """lengths: elements of a span of each parameter, a divisor of its number of elements (where it has none, it
        has one empty span)."""
        assert all(n % length == 0 for n, length in zip(part.layout.numels, lengths, strict=True))
        counts = [max(1, n // length) for n, length in zip(part.layout.numels, lengths, strict=True)]
        self.part, self.count, self._pieces = part, sum(counts), list[_Piece]()
        chunk = CHUNKS[part.world.device.type]
        for s in part.segments:
            first, length = sum(counts[: s.layer]), lengths[s.layer]
            at, end = s.offset, s.offset + s.numel
            while at < end:
                left = length - at % length
                whole = (end - at) // length if left == length else 0
                rows = max(1, min(whole, chunk // length))
                size = length if whole else min(left, end - at)
                size = min(size, chunk)
                self._pieces.append(_Piece(s.start + at - s.offset, rows, size, first + at // length))
                at += rows * size

    @classmethod
    def layers(cls, part: Slice) -> Spans:
        """One span for each parameter."""
        return cls(part, [max(1, n) for n in part.layout.numels])

    @classmethod
    def channels(cls, part: Slice) -> Spans:
        """One span for each index of a parameter's first dimension: its output channels."""
        return cls(part, [max(1, shape[1:].numel()) for shape in part.layout.shapes.values()])

    def sums(self, values: Tensor, *, squared: bool = False) -> Tensor:
        """Collective: (count,) float64: the sum of the values, (n,) of this slice, or of their squares, of each span.

        Values, in shares of their span's largest, are rounded to 34 bits and added up as integers. nan for a span with
        values that are not finite.
        """
        device = self.part.world.device
        largest = torch.zeros(self.count, dtype=torch.float64, device=device)
        for piece, rows in self._rows(values):
            most = rows.abs().amax(1).double().nan_to_num(torch.inf, torch.inf)
            own = largest[piece.number : piece.number + piece.rows]
            torch.maximum(own, most, out=own)
        largest = self.part.world.all_reduce(largest, dist.ReduceOp.MAX)
        sums = torch.zeros(self.count, dtype=torch.int64, device=device)
        for piece, rows in self._rows(values):
            numbers = slice(piece.number, piece.number + piece.rows)
            shares = rows.double() / largest[numbers, None]  # nan where the largest is 0 or not finite
            shares = (shares.square() if squared else shares) * BITS
            sums[numbers] += shares.round().nan_to_num(0.0, 0.0, 0.0).long().sum(1)
        unit = (largest.square() if squared else largest) / BITS
        total = self.part.world.all_reduce(sums).double() * unit
        return torch.where(largest.isfinite(), total, torch.nan)

    def spread(self, values: Tensor) -> Tensor:
        """(n,): for each element of this slice the value, of (count,), of its span."""
        out = values.new_empty(self.part.numel)
        for piece, rows in self._rows(out):
            rows.copy_(values[piece.number : piece.number + piece.rows, None].expand_as(rows))
        return out

    def multiply_(self, tensor: Tensor, values: Tensor) -> Tensor:
        """Each element of (n,) times the value, of (count,), of its span, in place; returns it."""
        for piece, rows in self._rows(tensor):
            rows.mul_(values[piece.number : piece.number + piece.rows, None])
        return tensor

    def numbers(self) -> Tensor:
        """(n,) int64: the number of each element's span."""
        return self.spread(torch.arange(self.count, device=self.part.world.device))

    def _rows(self, tensor: Tensor) -> Iterator[tuple[_Piece, Tensor]]:
        for p in self._pieces:
            yield p, tensor[p.start : p.start + p.rows * p.length].view(p.rows, p.length)
