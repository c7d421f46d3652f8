"""What is summed over everything that each input channel of each weight goes into: the same bits on any ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.engine.sharding.slices import Segment, Slice

BITS = 2.0**34
"""Integers per largest value of all: 2^29 elements can be added up."""


def column_sums(part: Slice, values: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Collective: (by name (input channels,) int64: the sum of the values, (n,) of this slice, of all ranks' weights of
    each; () float64: how much 1 is). A weight of one dimension has one input channel.

    Values are rounded to 34 bits of the largest one of all. Where one is not finite, neither is the unit.
    """
    device, shapes = part.world.device, part.layout.shapes
    most = torch.zeros((), dtype=torch.float64, device=device)
    if part.numel:
        most = values.abs().amax().double().nan_to_num(torch.inf, torch.inf)
    most = part.world.all_reduce(most, dist.ReduceOp.MAX)
    widths = [shape[1:].numel() for shape in shapes.values()]
    table = torch.zeros(sum(widths), dtype=torch.int64, device=device)
    for s in part.segments:
        width, begin = widths[s.layer], sum(widths[: s.layer])
        for start, rows, column, length in _pieces(s, width):
            shares = values[start : start + rows * length].view(rows, length).double() / most * BITS
            table[begin + column : begin + column + length] += shares.round().nan_to_num(0.0, 0.0, 0.0).long().sum(0)
    whole = torch.split(part.world.all_reduce(table), widths)
    inputs = [shape[1] if len(shape) > 1 else 1 for shape in shapes.values()]
    sums = {n: own.view(number, -1).sum(1) for n, own, number in zip(shapes, whole, inputs, strict=True)}
    return sums, torch.where(most.isfinite(), most / BITS, torch.nan)


def _pieces(s: Segment, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(start in the slice, rows, first column, columns) of matrices that a segment consists of: the rest of a row,
    whole rows, a beginning of one."""
    at, end = s.offset, s.offset + s.numel
    while at < end:
        column = at % width
        rows = (end - at) // width if column == 0 else 0
        length = width if rows else min(width - column, end - at)
        yield s.start + at - s.offset, max(1, rows), column, length
        at += max(1, rows) * length
