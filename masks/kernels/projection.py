"""Where do the probabilities go so that they sum to at most K: exact projection, sharded over ranks (ProbMask, eq. 6).

Who holds what: every rank has some runs of the network's float32 probabilities, each with the index in the network of
its first element. One threshold v belongs to all of them: s = clamp(z - v, 0, 1), v >= 0, sum s = K. With f(v) =
sum clamp(z - v, 0, 1), which is piecewise linear with its kinks at the breakpoints z and z - 1:

    A radix search for v over the bits of float32, 11 + 10 + 10 of them per all-reduce. A histogram of the breakpoints
    by their leading bits, counts and sums of the remaining bits, gives f at every edge between bins (f(0) at the first:
    if that is at most K, v = 0), and so the bin that holds v; the next round looks into that bin only. Three rounds
    leave two neighbouring float32 numbers, between which no breakpoint lies and f is a straight line: v in closed form.

Counts and remainders are integers and their sums do not depend on the order: v is bit-identical on every rank and for
every world size. What follows from the tables is computed where the runs are: on CUDA nothing waits for the device, and
one kernel per round spares the host the millisecond that sixty torch operations would take.

CUDA: Triton; CPU: numba; elsewhere, and where these cannot be had, torch. All give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ghostmask.engine.compiled import kernels_on, pieces_in, split_over_threads
from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.world import World

ROUNDS = ((20, 1216), (10, 1024), (0, 1024))
"""(bits below a bin's, bins) of each round; 1216 x 2^20 is the image of 2^25, above all breakpoints."""
SLACK = 1 + 2.0**-43
"""f(0) above K by no more than the rounding of its float64 sum counts as K."""
LARGEST = 2.0**24
"""Larger elements count as this: up to it z - 1 is a float32 number wherever it is above 0."""
CHUNK = 1 << 22
"""Elements per step of the torch form: bounds its temporary memory."""
SMALLEST_RANGE = 1 << 16
"""Elements worth a thread of their own."""
SHARES = 4
"""Parts of all pieces per thread."""
SELECTED_FRACTION = 8
"""A rank keeps a copy of the elements whose breakpoints are still in question, if it is this many times smaller."""
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
DITHER = (1 << 29) - 1

Runs = Sequence[tuple[Tensor, int]]
"""Contiguous float32 vectors on the world's device, each with the index in the network of its first element."""
Range = tuple[np.ndarray, int, int, int]
"""An array, where a range of it begins and ends, and its number among all pieces."""
Result = TypeVar("Result")


def project_(runs: Sequence[Runs], budgets: Sequence[float], numels: Sequence[int], world: World) -> Tensor:
    """Collective: replace the elements of all ranks by their projection onto {sum <= budget}; returns v >= 0.

    One or several budgets, each of elements of its own: runs: of each, those that this rank holds, or none; numels: of
    each, on all ranks together. Where every rank holds all elements, give a world of size 1. v: float64 (budgets,) on
    the world's device. At most 3 all-reduces for all of them (on the CPU 1 where the budgets are met as it is).

    |sum s - budget| <= 1e-3 in float64 where the constraint binds: s is rounded to float32 up or down by a dither (see
    `subtract_and_clamp_`), since rounding to nearest moves 25.5 million equal values by up to 0.7 weights.

    Where an element of any rank is not finite: RunStopped on every rank on the CPU. On CUDA nobody waits for the
    answer: v is nan, so are all probabilities, and the next loss stops the run.
    """
    for budget, numel in zip(budgets, numels, strict=True):
        if not 0 <= budget < math.inf or numel < 1:
            raise ValueError(f"budget = {budget} of {numel} elements: give a finite budget >= 0 and at least 1 element")
    for piece in (piece for part in runs for piece, _ in part):
        if piece.dtype != torch.float32 or piece.dim() != 1 or not piece.is_contiguous():
            form = f"{piece.dtype}, shape {tuple(piece.shape)}, strides {piece.stride()}"
            raise ValueError(f"probabilities are {form}: give contiguous float32 vectors")
    device = world.device
    runs = [[(piece.detach(), first) for piece, first in part if len(piece)] for part in runs]
    brackets = Brackets(budgets, device)
    breakpoints = [Breakpoints([piece for piece, _ in part], device) for part in runs]
    binding = bad = torch.zeros(())
    for number, (shift, bins) in enumerate(ROUNDS):
        bases = (brackets.base * bins).unbind()
        tables = torch.stack([b.table(base, shift, bins) for b, base in zip(breakpoints, bases, strict=True)])
        world.all_reduce(tables)
        brackets.narrow(tables, shift)
        if number == 0:
            bad, binding = tables[:, 0, bins].sum(), brackets.lowest > brackets.budget * SLACK
            if device.type == "cpu":
                if int(bad):
                    raise RunStopped(f"{int(bad)} of {sum(numels)} probabilities are not finite", EXIT_NON_FINITE)
                if not bool(binding.any()):
                    break
    thresholds = torch.where(bad > 0, math.nan, torch.where(binding, brackets.roots(), 0.0))
    for part, threshold in zip(runs, thresholds, strict=True):
        subtract_and_clamp_(part, threshold)
    return thresholds


class Breakpoints:
    """The breakpoints z and z - 1 of one budget's elements on this rank, to be counted in ever finer bins."""

    def __init__(self, pieces: list[Tensor], device: torch.device) -> None:
        self.pieces, self.device, self.selected = pieces, device, False

    def table(self, base: Tensor, shift: int, bins: int) -> Tensor:
        """int64 (2, bins + 1): counts of the breakpoints z less those of the breakpoints z - 1, and their remainders.

        Bin j holds the positive float32 numbers whose bits >> shift are base + j, base an int64 scalar; the remainder
        is the lower `shift` bits. Counts have one more column: the number of elements that are not finite. Bins of a
        later call lie inside one bin of the call before: on the CPU elements outside are then left behind, if few
        remain.
        """
        if not self.pieces:
            return torch.zeros(2, bins + 1, dtype=torch.int64, device=self.device)
        kernels = kernels_on(self.device, __name__)
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


def subtract_and_clamp_(runs: Runs, threshold: Tensor) -> None:
    """z = clamp(z - threshold, 0, 1), in float64, then rounded to float32 so that errors cancel in the sum.

    Vectors that are not empty. Of the 29 bits that float32 does not keep, a number in
    [0, 2^29) is added before they are cut off: element i rounds up where the fractional part of i x golden ratio, a
    low-discrepancy sequence, is large enough. The share that rounds up is then the cut-off fraction even among equal
    values, and depends on the element's own index only, not on the sharding. What float32 represents exactly (0 and 1,
    and all of it if threshold = 0) stays as it is.
    """
    kernels = kernels_on(threshold.device, __name__)
    if runs and kernels and not threshold.is_cuda:
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


class Brackets:
    """For each budget the bin `base` .. base + 1 (in units of the last round's bins) of float32 numbers that holds v.

    At first all positive numbers that a first round's bins hold; above them f is 0. All of shape (budgets,), float64
    and int64 (base, slope). value: f at the bin's upper edge; slope: -f' just above that edge, were there no
    breakpoint: the number of breakpoints z at or above the edge, less that of the breakpoints z - 1; lowest: f at the
    lower edge of the last round's bins.
    """

    def __init__(self, budgets: Sequence[float], device: torch.device, *, weighted: bool = False) -> None:
        """weighted: whether each breakpoint counts as often as a number, such as its cost, says; tables and slope are
        float64 then."""
        self.budget = torch.tensor(budgets, dtype=torch.float64).to(device, non_blocking=True)
        self.base, self.slope = torch.zeros(2, len(budgets), dtype=torch.int64, device=device)
        self.slope = self.slope.double() if weighted else self.slope
        self.value, self.lowest = torch.zeros(2, len(budgets), dtype=torch.float64, device=device)

    def narrow(self, tables: Tensor, shift: int) -> None:
        """Go down, in place, to the bin of the next round that holds the threshold: the lowest one if f(0) is below.

        tables: int64 (budgets, 2, bins + 1), of all ranks; see `Breakpoints.table`. float64 where these are weighted.
        """
        kernels = None if tables.is_floating_point() else kernels_on(tables.device, __name__)
        if kernels:
            kernels.narrow(tables, shift, self.budget, self.base, self.slope, self.value, self.lowest)
            return
        counts, remainders = tables[:, 0, :-1], tables[:, 1, :-1]
        bins = counts.shape[1]
        base, slope, value = self.base * bins, self.slope[:, None], self.value[:, None]
        steps = torch.arange(bins + 1, device=tables.device)
        widths = _floats((base[:, None] + steps) << shift).diff()
        above = slope + _from_above(counts) - counts
        # f(lower edge) - f(upper edge): breakpoints above the bin act over its whole width, one inside it over its
        # distance from the lower edge, which is its remainder. Exact in float64, product by product.
        rises = above * widths + remainders * (widths / (1 << shift))
        values = torch.cat([value + _from_above(rises), value], 1)
        place = ((values[:, :-1] > self.budget[:, None]).sum(1, keepdim=True) - 1).clamp_(min=0)
        self.base.copy_(base + place[:, 0])
        self.slope.copy_(above.gather(1, place)[:, 0])
        self.value.copy_(values.gather(1, place + 1)[:, 0])
        self.lowest.copy_(values[:, 0])

    def roots(self) -> Tensor:
        """The thresholds, once a bin is one float32 number wide: no breakpoint lies inside it, f is a straight line."""
        low, high = _floats(self.base), _floats(self.base + 1)
        root = high - (self.budget - self.value) / self.slope
        return torch.where(self.slope > 0, root.clamp(low, high), low)


def _from_above(values: Tensor) -> Tensor:
    return values.flip(1).cumsum(1).flip(1)


def _floats(images: Tensor) -> Tensor:
    return images.int().view(torch.float32).double()
