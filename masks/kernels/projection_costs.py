"""Where do probabilities go so that what they cost sums to at most a budget: the projection with costs, over all ranks.

Of n probabilities z with costs c > 0, those nearest to z with sum c s <= C and 0 <= s <= 1 are

    s = clamp(z - v c, 0, 1),  v >= 0,  sum c s = C   (v = 0 where it is less)

and, where nearness counts each as often as it costs (sum c (s - z)^2), clamp(z - v, 0, 1).

With y = z / c and y' = (z - 1) / c, f(v) = sum c^2 (max(y - v, 0) - max(y' - v, 0)): breakpoints as those of
`projection`, each with a weight. There are few costs, one per layer at most: each has tables of its own, made by the
same kernels, and integers until all ranks' are added up. So v is bit-identical on any number of ranks, after the same
three all-reduces. Breakpoints are rounded to float32: the sum is C to 1e-7 of it, and as exact as without costs where
the costs' ratios are powers of two, as multiplications are in networks that halve their images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.world import World
from ghostmask.masks.kernels.projection import (
    LARGEST,
    ROUNDS,
    SLACK,
    Brackets,
    Breakpoints,
    Runs,
    subtract_and_clamp_,
)


def project_costs_(priced: Mapping[int, Runs], budget: float, world: World, *, even: bool = False) -> Tensor:
    """Collective: replace the elements of all ranks by their projection onto {sum c s <= budget}; returns v, ().

    priced: cost >= 0, the same ones on every rank -> the runs of that cost that this rank holds, as in `project_`;
    what costs nothing is only limited to [0, 1]. even: nearness counts each as often as it costs, and all move by v.
    What is not finite: as in `project_`.
    """
    costs, device = sorted(cost for cost in priced if cost > 0), world.device
    # So large that every y is at most 1: no kernel then takes it for one with a breakpoint y - 1.
    scales = [LARGEST if even else cost / costs[0] * LARGEST for cost in costs]
    elements = [[piece.detach() for piece, _ in priced[cost] if len(piece)] for cost in costs]
    upper = [_breakpoints(own, 0.0, scale, device) for own, scale in zip(elements, scales, strict=True)]
    lower = [_breakpoints(own, 1.0, scale, device) for own, scale in zip(elements, scales, strict=True)]
    factors = torch.tensor([c * s for c, s in zip(costs, scales, strict=True)], dtype=torch.float64).to(device)
    brackets = Brackets([budget], device, weighted=True)
    binding = bad = torch.zeros(())
    for number, (shift, bins) in enumerate(ROUNDS):
        base = (brackets.base * bins)[0]
        tables = torch.stack(
            [u.table(base, shift, bins) - w.table(base, shift, bins) for u, w in zip(upper, lower, strict=True)]
        )
        if number == 0:
            tables[0, 0, bins] = sum((~piece.isfinite()).sum() for own in elements for piece in own)
        world.all_reduce(tables)
        if number == 0:
            bad = tables[0, 0, bins].clone()
        brackets.narrow((tables.double() * factors[:, None, None]).sum(0, keepdim=True), shift)
        if number == 0:
            binding = brackets.lowest > brackets.budget * SLACK
            if device.type == "cpu":
                if int(bad):
                    raise RunStopped(f"{int(bad)} probabilities are not finite", EXIT_NON_FINITE)
                if not bool(binding.any()):
                    break
    threshold = torch.where(bad > 0, math.nan, torch.where(binding, brackets.roots(), 0.0))[0]
    for cost, runs in priced.items():
        own = [(piece.detach(), first) for piece, first in runs if len(piece)]
        subtract_and_clamp_(own, threshold * (scales[costs.index(cost)] if cost else 0.0))
    return threshold * scales[0] / (1 if even else costs[0])


def _breakpoints(pieces: list[Tensor], below: float, scale: float, device: torch.device) -> Breakpoints:
    """Those (z - below) / scale."""
    return Breakpoints([(piece.clamp(max=LARGEST) - below) / scale for piece in pieces], device)
