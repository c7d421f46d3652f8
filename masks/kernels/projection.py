"""Where do the probabilities go so that they sum to at most K: exact projection, sharded over ranks (ProbMask, eq. 6).

Who holds what: every rank has a shard of the flattened float32 probabilities (ZeRO's own slice; padding is exactly 0 at
its end and stays 0). One threshold v belongs to all of them: s = clamp(z - v, 0, 1), v >= 0, sum s = K. With f(v) =
sum clamp(z - v, 0, 1), which is piecewise linear with its kinks at the breakpoints z and z - 1:

    A radix search for v over the bits of float32, 11 + 10 + 10 of them per all-reduce. A histogram of the breakpoints
    by their leading bits, counts and sums of the remaining bits, gives f at every edge between bins (f(0) at the first:
    if that is at most K, v = 0), and so the bin that holds v; the next round looks into that bin only. Three rounds
    leave two neighbouring float32 numbers, between which no breakpoint lies and f is a straight line: v in closed form.

Counts and remainders are integers and their sums do not depend on the order: v is bit-identical on every rank and for
every world size. What follows from the tables is computed where the shards are: on CUDA nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.world import World
from ghostmask.masks.kernels.projection_bracket import Brackets
from ghostmask.masks.kernels.projection_passes import Breakpoints, subtract_and_clamp_

ROUNDS = ((20, 1216), (10, 1024), (0, 1024))
"""(bits below a bin's, bins) of each round; 1216 x 2^20 is the image of 2^25, above all breakpoints."""
SLACK = 1 + 2.0**-43
"""f(0) above K by no more than the rounding of its float64 sum counts as K."""


def find_threshold(shard: Tensor, budget: float, numel: int, world: World, *, replicated: bool = False) -> Tensor:
    """Collective: v >= 0 such that clamp(z - v, 0, 1) over all ranks is the projection of z onto {sum <= budget}.

    A float64 scalar on the shard's device. shard: this rank's float32 elements, contiguous, any finite values; numel:
    real elements of all ranks together; replicated: every rank holds all elements (ZeRO stage 0), and nothing is
    reduced. At most 3 all-reduces (on the CPU 1 where the budget is met as it is).

    Where an element of any rank is not finite: RunStopped on every rank on the CPU. On CUDA nobody waits for the
    answer: v is nan, so are all probabilities, and the next loss stops the run.
    """
    return _thresholds([[_flat(shard)]], [budget], [numel], world, replicated)[0]


def project_(
    shard: Tensor, budget: float, numel: int, first_index: int, world: World, *, replicated: bool = False
) -> Tensor:
    """Collective: replace the shard by its part of the projection; returns v (see `find_threshold`).

    first_index: number of the shard's first element among all ranks' elements. |sum s - budget| <= 1e-3 in float64
    where the constraint binds: s is rounded to float32 up or down by a dither (see `subtract_and_clamp_`), since
    rounding to nearest moves 25.5 million equal values by up to 0.7 weights.
    """
    threshold = find_threshold(shard, budget, numel, world, replicated=replicated)
    subtract_and_clamp_(_flat(shard), threshold, first_index)
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
) -> Tensor:
    """Collective: `project_` with a budget per layer, in the same 3 all-reduces; returns v of every layer, (layers,).

    segments: (start in the shard, number of elements, layer) of the pieces of layers that this rank holds; elements
    outside every segment (padding) are not touched. numels: real elements of each layer over all ranks.
    """
    flat = _flat(shard)
    pieces: list[list[Tensor]] = [[] for _ in budgets]
    for start, count, layer in segments:
        pieces[layer].append(flat[start : start + count])
    thresholds = _thresholds(pieces, budgets, numels, world, replicated)
    for start, count, layer in segments:
        subtract_and_clamp_(flat[start : start + count], thresholds[layer], first_index + start)
    return thresholds


def _thresholds(
    pieces: list[list[Tensor]], budgets: list[float], numels: list[int], world: World, replicated: bool
) -> Tensor:
    for budget, numel in zip(budgets, numels, strict=True):
        if not 0 <= budget < math.inf or numel < 1:
            raise ValueError(f"budget = {budget} of {numel} elements: give a finite budget >= 0 and at least 1 element")
    device = world.device
    brackets = Brackets.around(budgets, device)
    breakpoints = [Breakpoints(part, device) for part in pieces]
    binding = bad = torch.zeros(())
    for number, (shift, bins) in enumerate(ROUNDS):
        bases = (brackets.base * bins).unbind()
        tables = torch.stack([b.table(base, shift, bins) for b, base in zip(breakpoints, bases, strict=True)])
        if not replicated:
            tables = world.all_reduce(tables)
        brackets.narrow(tables, shift)
        if number == 0:
            bad, binding = tables[:, 0, bins].sum(), brackets.lowest > brackets.budget * SLACK
            if device.type == "cpu":
                if int(bad):
                    raise RunStopped(f"{int(bad)} of {sum(numels)} probabilities are not finite", EXIT_NON_FINITE)
                if not bool(binding.any()):
                    break
    thresholds = torch.where(binding, brackets.roots(), 0.0)
    return torch.where(bad > 0, math.nan, thresholds)


def _flat(shard: Tensor) -> Tensor:
    if shard.dtype != torch.float32 or not shard.is_contiguous():
        raise ValueError(f"probabilities are {shard.dtype}, strides {shard.stride()}: give contiguous float32")
    return shard.detach().view(-1)
