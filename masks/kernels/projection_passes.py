"""What passes over the probabilities does the projection take: count its breakpoints by bins, then subtract and clamp.

CUDA: Triton; CPU: numba; elsewhere, and where these cannot be had, torch. All give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ghostmask.engine.compiled import kernels_on, pieces_in, split_over_threads

LARGEST = 2.0**24
"""Larger elements count as this: up to it z - 1 is a float32 number wherever it is above 0."""
CHUNK = 1 << 22
"""Elements per step of the torch form: bounds its temporary memory."""
MODULE = "ghostmask.masks.kernels.projection"
SMALLEST_RANGE = 1 << 16
"""Elements worth a thread of their own."""
SHARES = 4
"""Parts of all pieces per thread."""
SELECTED_FRACTION = 8
"""A rank keeps a copy of the elements whose breakpoints are still in question, if it is this many times smaller."""
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
DITHER = (1 << 29) - 1

Range = tuple[np.ndarray, int, int, int]
"""An array, where a range of it begins and ends, and its number among all pieces."""
Result = TypeVar("Result")


class Breakpoints:
    """The breakpoints z and z - 1 of one budget's elements on this rank, to be counted in ever finer bins."""

    def __init__(self, pieces: Sequence[Tensor], device: torch.device) -> None:
        self.pieces, self.device, self.selected = [p.detach() for p in pieces if len(p)], device, False

    def table(self, base: Tensor, shift: int, bins: int) -> Tensor:
        """int64 (2, bins + 1): counts of the breakpoints z less those of the breakpoints z - 1, and their remainders.

        Bin j holds the positive float32 numbers whose bits >> shift are base + j, base an int64 scalar; the remainder
        is the lower `shift` bits. Counts have one more column: the number of elements that are not finite. Bins of a
        later call lie inside one bin of the call before: on the CPU elements outside are then left behind, if few
        remain.
        """
        if not self.pieces:
            return torch.zeros(2, bins + 1, dtype=torch.int64, device=self.device)
        kernels = kernels_on(self.device, MODULE)
        if not kernels:
            return histogram(self.pieces, base, shift, bins)
        if self.device.type == "cuda":
            tables: list[Tensor] = [kernels.histogram(piece, base, shift, bins) for piece in self.pieces]
            return tables[0] if len(tables) == 1 else torch.stack(tables).sum(0)
        if int(base) > 0 and not self.selected:
            self._select(kernels, int(base) << shift, bins << shift)

        def work(ranges: list[Range]) -> Tensor:
            table, scratch = np.zeros((2, bins + 1), np.int64), np.zeros((2, 4, bins + 1), np.int64)
            for array, start, stop, _ in ranges:
                kernels.histogram(array, start, stop, int(base), shift, bins, table, scratch)
            return torch.from_numpy(table)

        return torch.stack(_over_threads(work, self.pieces)).sum(0)

    def _select(self, kernels: Any, low: int, width: int) -> None:
        """Go on with copies of the elements that have a breakpoint in that range of bits, if they are few."""

        def work(ranges: list[Range]) -> Tensor | None:
            numel = sum(stop - start for _, start, stop, _ in ranges)
            out, count = torch.empty(numel // SELECTED_FRACTION + kernels.CHUNK), 0
            for array, start, stop, _ in ranges:
                count = kernels.select(array, start, stop, low, width, out.numpy(), count)
                if count < 0:
                    return None
            return out[:count]

        parts = _over_threads(work, self.pieces)
        if all(part is not None for part in parts):
            self.pieces, self.selected = [part for part in parts if part is not None and len(part)], True


def _over_threads(work: Callable[[list[Range]], Result], pieces: Sequence[Tensor]) -> list[Result]:
    """[work(ranges), ...] of parts that cover all pieces, in order."""
    arrays, lengths = [p.numpy() for p in pieces], [len(p) for p in pieces]

    def ranges(first: int, end: int) -> list[Range]:
        return [(arrays[number], start, stop, number) for number, start, stop in pieces_in(lengths, first, end)]

    return split_over_threads(lambda a, b: work(ranges(a, b)), sum(lengths), SMALLEST_RANGE, shares=SHARES)


def histogram(pieces: Sequence[Tensor], base: Tensor, shift: int, bins: int) -> Tensor:
    """The table of `Breakpoints.table` in torch operations; at least one piece."""
    table = torch.zeros(2, bins + 1, dtype=torch.int64, device=pieces[0].device)
    for chunk in (chunk for piece in pieces for chunk in torch.split(piece, CHUNK)):
        table[0, bins] += (~chunk.isfinite()).sum()
        limited = chunk.clamp(max=LARGEST)
        for breakpoints, sign in ((limited, 1), (limited - 1, -1)):
            bits = breakpoints.view(torch.int32).long()
            place = (bits >> shift) - base
            inside = (breakpoints > 0) & (place >= 0) & (place < bins)
            place = place.where(inside, bins)  # the last bin takes what belongs to none
            # Not bincount: on CUDA it waits for the device, to look at the largest bin.
            for row, what in zip(table, (torch.ones_like(bits), bits & ((1 << shift) - 1)), strict=True):
                row[:bins] += sign * torch.zeros_like(row).scatter_add_(0, place, what)[:bins]
    return table


def subtract_and_clamp_(runs: Sequence[tuple[Tensor, int]], threshold: Tensor) -> None:
    """z = clamp(z - threshold, 0, 1), in float64, then rounded to float32 so that errors cancel in the sum.

    runs: (vector, index in the network of its first element). Of the 29 bits that float32 does not keep, a number in
    [0, 2^29) is added before they are cut off: element i rounds up where the fractional part of i x golden ratio, a
    low-discrepancy sequence, is large enough. The share that rounds up is then the cut-off fraction even among equal
    values, and depends on the element's own index only, not on the sharding. What float32 represents exactly (0 and 1,
    and all of it if threshold = 0) stays as it is.
    """
    runs = [(run.detach(), first) for run, first in runs if len(run)]
    if not runs:
        return
    kernels = kernels_on(threshold.device, MODULE)
    if kernels and not threshold.is_cuda:
        v = float(threshold)

        def work(ranges: list[Range]) -> None:
            for array, start, stop, number in ranges:
                kernels.subtract_and_clamp(array, start, stop, v, runs[number][1])

        _over_threads(work, [run for run, _ in runs])
        return
    for run, first in runs:
        if kernels:
            kernels.subtract_and_clamp(run, threshold, first)
            continue
        for start in range(0, len(run), CHUNK):
            chunk = run[start : start + CHUNK]
            y = (chunk.clamp(max=LARGEST).double() - threshold).clamp_(0, 1).view(torch.int64)
            index = torch.arange(first + start, first + start + len(chunk), device=chunk.device)
            chunk.copy_(((y + ((index * GOLDEN >> 35) & DITHER)) & ~DITHER).view(torch.float64))
