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
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.compiled import kernels_on
from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.world import World
from ghostmask.masks.kernels.projection_passes import Breakpoints, subtract_and_clamp_

ROUNDS = ((20, 1216), (10, 1024), (0, 1024))
"""(bits below a bin's, bins) of each round; 1216 x 2^20 is the image of 2^25, above all breakpoints."""
SLACK = 1 + 2.0**-43
"""f(0) above K by no more than the rounding of its float64 sum counts as K."""

Runs = Sequence[tuple[Tensor, int]]
"""Contiguous float32 vectors on the world's device, each with the index in the network of its first element."""


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
    brackets = Brackets.around(budgets, device)
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


@dataclass(frozen=True)
class Brackets:
    """For each budget the bin `base` .. base + 1 (in units of the last round's bins) of float32 numbers that holds v.

    All of shape (budgets,), float64 and int64 (base, slope). value: f at the bin's upper edge; slope: -f' just above
    that edge, were there no breakpoint: the number of breakpoints z at or above the edge, less that of the breakpoints
    z - 1; lowest: f at the lower edge of the last round's bins.
    """

    budget: Tensor
    base: Tensor
    slope: Tensor
    value: Tensor
    lowest: Tensor

    @classmethod
    def around(cls, budgets: Sequence[float], device: torch.device) -> Brackets:
        """All positive numbers that a first round's bins hold; above them f is 0."""
        wanted = torch.tensor(budgets, dtype=torch.float64).to(device, non_blocking=True)
        base, slope = torch.zeros(2, len(budgets), dtype=torch.int64, device=device)
        value, lowest = torch.zeros(2, len(budgets), dtype=torch.float64, device=device)
        return cls(wanted, base, slope, value, lowest)

    def narrow(self, tables: Tensor, shift: int) -> None:
        """Go down, in place, to the bin of the next round that holds the threshold: the lowest one if f(0) is below.

        tables: int64 (budgets, 2, bins + 1), of all ranks; see `masks.kernels.projection_passes.Breakpoints.table`.
        """
        kernels = kernels_on(tables.device, __name__)
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
