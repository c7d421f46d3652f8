"""What passes over a shard does the projection take: count its breakpoints by bins, then subtract and clamp.

CUDA: Triton; CPU: numba; elsewhere, and where these cannot be had, torch. All give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghostmask.masks.kernels.compiled import kernels_for, split_over_threads

LARGEST = 2.0**24
"""Larger elements count as this: up to it z - 1 is a float32 number wherever it is above 0."""
CHUNK = 1 << 22
"""Elements per step of the torch form: bounds its temporary memory."""
SMALLEST_RANGE = 1 << 16
"""Elements worth a thread of their own."""
SHARES = 4
"""Parts of a piece per thread."""
SELECTED_FRACTION = 8
"""A rank keeps a copy of the elements whose breakpoints are still in question, if it is this many times smaller."""
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
DITHER = (1 << 29) - 1


class Breakpoints:
    """The breakpoints z and z - 1 of one budget's elements on this rank, to be counted in ever finer bins."""

    def __init__(self, pieces: list[Tensor], device: torch.device) -> None:
        self.pieces, self.device, self.selected = [p for p in pieces if len(p)], device, False

    def table(self, base: Tensor, shift: int, bins: int) -> Tensor:
        """int64 (2, bins + 1): counts of the breakpoints z less those of the breakpoints z - 1, and their remainders.

        Bin j holds the positive float32 numbers whose bits >> shift are base + j, base an int64 scalar; the remainder
        is the lower `shift` bits. Counts have one more column: the number of elements that are not finite. Bins of a
        later call lie inside one bin of the call before: on the CPU elements outside are then left behind, if few
        remain.
        """
        if self.device.type == "cpu" and int(base) > 0 and not self.selected:
            self._select(int(base) << shift, bins << shift)
        tables = [histogram(piece, base, shift, bins) for piece in self.pieces]
        if not tables:
            return torch.zeros(2, bins + 1, dtype=torch.int64, device=self.device)
        return tables[0] if len(tables) == 1 else torch.stack(tables).sum(0)

    def _select(self, low: int, width: int) -> None:
        selected: list[Tensor] = []
        for piece in self.pieces:
            kernels = kernels_for(piece, "ghostmask.masks.kernels.projection")
            parts = [None] if kernels is None else _selected(kernels, piece, low, width)
            if any(part is None for part in parts):
                return
            selected += [part for part in parts if part is not None]
        self.pieces, self.selected = [part for part in selected if len(part)], True


def _selected(kernels: Any, piece: Tensor, low: int, width: int) -> list[Tensor | None]:
    """Copies of the elements with a breakpoint in that range of bits, one per thread; None where they are many."""
    z = piece.numpy()

    def work(first: int, end: int) -> Tensor | None:
        out = torch.empty((end - first) // SELECTED_FRACTION + kernels.CHUNK)
        count = kernels.select(z, first, end, low, width, out.numpy())
        return out[:count] if count >= 0 else None

    return split_over_threads(work, len(z), SMALLEST_RANGE, shares=SHARES)


def histogram(piece: Tensor, base: Tensor, shift: int, bins: int) -> Tensor:
    """The table of one piece; see `Breakpoints.table`."""
    kernels = kernels_for(piece, "ghostmask.masks.kernels.projection")
    if kernels and piece.is_cuda:
        table: Tensor = kernels.histogram(piece, base, shift, bins)
        return table
    if kernels:
        z, first_bin = piece.numpy(), int(base)
        work = lambda a, b: torch.from_numpy(kernels.histogram(z, a, b, first_bin, shift, bins))  # noqa: E731
        return torch.stack(split_over_threads(work, len(z), SMALLEST_RANGE, shares=SHARES)).sum(0)
    table = torch.zeros(2, bins + 1, dtype=torch.int64, device=piece.device)
    for chunk in torch.split(piece, CHUNK):
        table[0, bins] += (~chunk.isfinite()).sum()
        limited = chunk.clamp(max=LARGEST)
        for breakpoints, sign in ((limited, 1), (limited - 1, -1)):
            bits = breakpoints.view(torch.int32).long()
            place = (bits >> shift) - base
            inside = (breakpoints > 0) & (place >= 0) & (place < bins)
            place = place.where(inside, bins)  # the last bin takes what belongs to none
            rest = (bits & ((1 << shift) - 1)).double()
            table[0, :bins] += sign * torch.bincount(place, minlength=bins + 1)[:bins]
            # Exact in float64: integers below 2^20 that sum to less than 2^53, whatever the order of the additions.
            table[1, :bins] += sign * torch.bincount(place, rest, minlength=bins + 1)[:bins].long()
    return table


def subtract_and_clamp_(piece: Tensor, threshold: Tensor, first_index: int) -> None:
    """piece = clamp(piece - threshold, 0, 1), in float64, then rounded to float32 so that errors cancel in the sum.

    Of the 29 bits that float32 does not keep, a number in [0, 2^29) is added before they are cut off: element i rounds
    up where the fractional part of i x golden ratio, a low-discrepancy sequence, is large enough. The share that rounds
    up is then the cut-off fraction even among equal values, and depends on the element's own number only, not on the
    sharding. What float32 represents exactly (0 and 1, and all of it if threshold = 0) stays as it is.
    """
    kernels = kernels_for(piece, "ghostmask.masks.kernels.projection")
    if kernels and piece.is_cuda and len(piece):
        kernels.subtract_and_clamp(piece, threshold, first_index)
        return
    if kernels:
        z, v = piece.numpy(), float(threshold)
        work = lambda a, b: kernels.subtract_and_clamp(z, a, b, v, first_index)  # noqa: E731
        split_over_threads(work, len(z), SMALLEST_RANGE, shares=SHARES)
        return
    for start in range(0, len(piece), CHUNK):
        chunk = piece[start : start + CHUNK]
        y = (chunk.clamp(max=LARGEST).double() - threshold).clamp_(0, 1).view(torch.int64)
        index = torch.arange(first_index + start, first_index + start + len(chunk), device=chunk.device)
        chunk.copy_(((y + ((index * GOLDEN >> 35) & DITHER)) & ~DITHER).view(torch.float64))
