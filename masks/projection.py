"""Where do the probabilities go so that they sum to at most K: exact projection, sharded over ranks (ProbMask, eq. 6).

Who holds what: every rank has a shard of the flattened float32 probabilities (ZeRO's own slice; padding is exactly 0 at
its end and stays 0). One threshold v belongs to all of them: s = clamp(z - v, 0, 1), v >= 0, sum s = K. With f(v) =
sum clamp(z - v, 0, 1), which is piecewise linear with its kinks at the breakpoints z and z - 1:

    1. all-reduce: f(0); at most K -> v = 0.
    2.-4. all-reduce: a radix search for v over the bits of float32, 11 + 10 + 10. A histogram of the breakpoints by
       their leading bits, counts and sums of the remaining bits, gives f *exactly* at every edge between bins, and so
       the bin that holds v; the next round looks into that bin only. Three rounds leave two neighbouring float32
       numbers, between which no breakpoint lies and f is a straight line: v in closed form.

Counts and remainders are integers and their sums do not depend on the order: v is bit-identical on every rank and for
every world size. (z - 1 is a float32 number for every z in [1, 2^24]; larger z count as 2^24.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import EXIT_NON_FINITE, RunStopped
from engine.world import World
from masks.compiled import load_kernels, split_over_threads

ROUNDS = ((20, 1216), (10, 1024), (0, 1024))
"""(bits below a bin's, bins) of each round; 1216 x 2^20 is the image of 2^25, above all breakpoints."""
LARGEST = 2.0**24
CHUNK = 1 << 22
"""Elements per step of the torch form: bounds its temporary memory."""
SMALLEST_RANGE = 1 << 16
"""Elements worth a thread of their own."""
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
DITHER = (1 << 29) - 1

IntArray = npt.NDArray[np.int64]


def find_threshold(shard: Tensor, budget: float, numel: int, world: World, *, replicated: bool = False) -> float:
    """Collective: v >= 0 such that clamp(z - v, 0, 1) over all ranks is the projection of z onto {sum <= budget}.

    shard: this rank's float32 elements, contiguous, any finite values; numel: real elements of all ranks together;
    replicated: every rank holds all elements (ZeRO stage 0), and nothing is reduced. Raises RunStopped on every rank
    where an element of any rank is not finite. At most 4 all-reduces.
    """
    return _thresholds([[_flat(shard)]], [budget], [numel], world, replicated)[0]


def project_(
    shard: Tensor, budget: float, numel: int, first_index: int, world: World, *, replicated: bool = False
) -> float:
    """Collective: replace the shard by its part of the projection; returns v (see `find_threshold`).

    first_index: number of the shard's first element among all ranks' elements. |sum s - budget| <= 1e-3 in float64
    where the constraint binds: s is rounded to float32 up or down by a dither (see `_subtract_and_clamp_`), since
    rounding to nearest moves 25.5 million equal values by up to 0.7 weights.
    """
    threshold = find_threshold(shard, budget, numel, world, replicated=replicated)
    _subtract_and_clamp_(_flat(shard), threshold, first_index)
    return threshold


def project_layers_(
    shard: Tensor,
    segments: list[tuple[int, int, int]],
    budgets: list[float],
    numels: list[int],
    first_index: int,
    world: World,
    *,
    replicated: bool = False,
) -> list[float]:
    """Collective: `project_` with a budget per layer, in the same 4 all-reduces; returns v of every layer.

    segments: (start in the shard, number of elements, layer) of the pieces of layers that this rank holds; elements
    outside every segment (padding) are not touched. numels: real elements of each layer over all ranks.
    """
    flat = _flat(shard)
    pieces: list[list[Tensor]] = [[] for _ in budgets]
    for start, count, layer in segments:
        pieces[layer].append(flat[start : start + count])
    thresholds = _thresholds(pieces, budgets, numels, world, replicated)
    for start, count, layer in segments:
        _subtract_and_clamp_(flat[start : start + count], thresholds[layer], first_index + start)
    return thresholds


@dataclass
class _Bracket:
    """Bin `base` .. base + 1 (in units of the last round's bins) of float32 numbers that holds the threshold.

    terms: numbers that sum to f at the bin's upper edge; slope: -f' just above that edge, were there no breakpoint: the
    number of breakpoints z at or above the edge, less that of the breakpoints z - 1.
    """

    budget: float
    base: int = 0
    slope: int = 0
    terms: list[float] = field(default_factory=lambda: [0.0])

    def narrow(self, table: IntArray, shift: int, bins: int) -> None:
        """Go down to the one of `bins` bins that holds the threshold; table: int64 (2, bins), of all ranks."""
        self.base *= bins
        edges = _floats(np.arange(self.base, self.base + bins + 1) << shift)
        widths = np.diff(edges)
        at_or_above = self.slope + table[0, ::-1].cumsum()[::-1]
        above = np.append(at_or_above[1:], self.slope)
        # f(lower edge) - f(upper edge): breakpoints above the bin act over its whole width, one inside it over its
        # distance from the lower edge, which is its remainder. Both products are exact.
        rises = np.stack([above * widths, table[1] * (widths / (1 << shift))])
        values = math.fsum(self.terms) + rises.sum(0)[::-1].cumsum()[::-1]
        place = max(int((values > self.budget).sum()) - 1, 0)
        passed = rises[:, place + 1 :]
        self.terms += passed[passed != 0].tolist()
        self.slope = int(above[place])
        self.base += place

    def root(self) -> float:
        """The threshold, once a bin is one float32 number wide."""
        low, high = _floats(np.array([self.base, self.base + 1])).tolist()
        missing = math.fsum([self.budget, *(-term for term in self.terms)])
        return float(max(high - missing / self.slope if self.slope else low, 0.0))


def _floats(images: IntArray) -> npt.NDArray[np.float64]:
    return images.astype(np.int32).view(np.float32).astype(np.float64)


def _thresholds(
    pieces: list[list[Tensor]], budgets: list[float], numels: list[int], world: World, replicated: bool
) -> list[float]:
    for budget, numel in zip(budgets, numels, strict=True):
        if not 0 <= budget < math.inf or numel < 1:
            raise ValueError(f"budget = {budget} of {numel} elements: give a finite budget >= 0 and at least 1 element")
    # The largest scale at which the sum of numel ones fits into int64; 2^40 is finer than any float32 that matters.
    scales = [2.0 ** min(61 - numel.bit_length(), 40) for numel in numels]
    sums = [_sum([_clamped_sum(p, scale) for p in part], 2) for part, scale in zip(pieces, scales, strict=True)]
    totals = _reduced(sums, pieces, world, replicated)
    if (bad := int(totals[:, 1].sum())) > 0:
        raise RunStopped(f"{bad} of {sum(numels)} probabilities are not finite", EXIT_NON_FINITE)
    thresholds = [0.0] * len(budgets)
    binding = [i for i, scale in enumerate(scales) if totals[i, 0] > budgets[i] * scale]
    brackets = {i: _Bracket(budgets[i]) for i in binding}
    for shift, bins in ROUNDS if binding else ():
        tables = [
            _sum([_histogram(p, brackets[i].base * bins, shift, bins) for p in pieces[i]], 2, bins) for i in binding
        ]
        for i, table in zip(binding, _reduced(tables, pieces, world, replicated), strict=True):
            brackets[i].narrow(table, shift, bins)
    for i in binding:
        thresholds[i] = brackets[i].root()
    return thresholds


def _reduced(values: list[Tensor], pieces: list[list[Tensor]], world: World, replicated: bool) -> IntArray:
    """The stacked int64 values summed over all ranks: one all-reduce."""
    stacked = torch.stack(values)
    array: IntArray = (stacked if replicated else world.all_reduce(stacked.to(world.device))).cpu().numpy()
    return array


def _sum(values: list[Tensor], *shape: int) -> Tensor:
    """The sum of int64 tensors of that shape; zeros where this rank holds no piece."""
    return torch.stack(values).sum(0) if values else torch.zeros(shape, dtype=torch.int64)


def _flat(shard: Tensor) -> Tensor:
    if shard.dtype != torch.float32 or not shard.is_contiguous():
        raise ValueError(f"probabilities are {shard.dtype}, strides {shard.stride()}: give contiguous float32")
    return shard.detach().view(-1)


def _kernels(piece: Tensor) -> Any:
    return load_kernels("masks.projection_cpu") if piece.device.type == "cpu" else None


def _clamped_sum(piece: Tensor, scale: float) -> Tensor:
    """int64 (2,): fixed-point sum of clamp(z, 0, 1), number of elements that are not finite."""
    if kernels := _kernels(piece):
        z = piece.numpy()
        parts = split_over_threads(lambda a, b: kernels.clamped_sum(z, a, b, scale), len(z), SMALLEST_RANGE)
        return torch.tensor(parts, dtype=torch.int64).sum(0)
    sums = [
        torch.stack([(z.clamp(0, 1).double() * scale + 0.5).long().sum(), (~z.isfinite()).sum()])
        for z in torch.split(piece, CHUNK)
    ]
    return _sum(sums, 2).to(piece.device)


def _histogram(piece: Tensor, base: int, shift: int, bins: int) -> Tensor:
    """int64 (2, bins): see `masks.projection_cpu.histogram`."""
    if kernels := _kernels(piece):
        z = piece.numpy()
        work = lambda a, b: kernels.histogram(z, a, b, base, shift, bins)  # noqa: E731
        return torch.from_numpy(np.sum(split_over_threads(work, len(z), SMALLEST_RANGE), axis=0))
    table = torch.zeros(2, bins, dtype=torch.int64, device=piece.device)
    for chunk in torch.split(piece, CHUNK):
        limited = chunk.clamp(max=LARGEST)
        for breakpoints, sign in ((limited, 1), (limited - 1, -1)):
            bits = breakpoints[breakpoints > 0].view(torch.int32).long()
            place = (bits >> shift) - base
            inside = (place >= 0) & (place < bins)
            place, rest = place[inside], bits[inside] & ((1 << shift) - 1)
            table[0] += sign * torch.bincount(place, minlength=bins)
            # Exact in float64: integers below 2^20 that sum to less than 2^53, whatever the order of the additions.
            table[1] += sign * torch.bincount(place, rest.double(), minlength=bins).long()
    return table


def _subtract_and_clamp_(piece: Tensor, threshold: float, first_index: int) -> None:
    """piece = clamp(piece - threshold, 0, 1), in float64, then rounded to float32 so that errors cancel in the sum.

    Of the 29 bits that float32 does not keep, a number in [0, 2^29) is added before they are cut off: element i rounds
    up where the fractional part of i x golden ratio, a low-discrepancy sequence, is large enough. The share that rounds
    up is then the cut-off fraction even among equal values, and depends on the element's own number only, not on the
    sharding. What float32 represents exactly (0 and 1, and all of it if threshold = 0) stays as it is.
    """
    if kernels := _kernels(piece):
        z = piece.numpy()
        work = lambda a, b: kernels.subtract_and_clamp(z, a, b, threshold, first_index)  # noqa: E731
        split_over_threads(work, len(z), SMALLEST_RANGE)
        return
    for start in range(0, len(piece), CHUNK):
        chunk = piece[start : start + CHUNK]
        y = (chunk.clamp(max=LARGEST).double() - threshold).clamp_(0, 1).view(torch.int64)
        index = torch.arange(first_index + start, first_index + start + len(chunk), device=chunk.device)
        chunk.copy_(((y + ((index * GOLDEN >> 35) & DITHER)) & ~DITHER).view(torch.float64))
