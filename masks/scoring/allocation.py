"""How many weights of each layer are kept: evenly, or by the layers' shapes (ER, ERK)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction

from ghostmask.engine.errors import bad_value
from ghostmask.masks.scoring.topk import kept_count, protected_counts


def layer_counts(
    shapes: Sequence[Sequence[int]], density: float, allocation: str, min_per_layer: int = 0, *,
    first_dense: bool = False, lengths: Sequence[int] | None = None,
) -> list[int]:  # fmt: skip
    """Kept weights of each layer, round(density n) in all, at least min(min_per_layer, numel) in each.

    lengths: weights of each layer's units (divisors of its size); then units are counted, as many as have room in that
    many weights.

    uniform: the same density everywhere. er (Mocanu et al. 2018): density_l proportional to (in + out) / (in out).
    erk (Evci et al. 2020): to sum(shape) / prod(shape), kernel sizes included. Layers that would exceed 1 are dense and
    the others share the rest, solved again until none does. Fractions of a weight go to the largest remainders, the
    earlier layer first. first_dense: the first layer keeps all its weights, which count as any others. Raises
    InputError where that, or min_per_layer, is more than there is.
    """
    sizes = [math.prod(shape) for shape in shapes]
    counted = {"uniform": 0, "er": 2, "erk": None}[allocation]
    cut = [shape[:counted] or (1,) for shape in shapes]
    shares = [Fraction(sum(c), math.prod(c)) * size for c, size in zip(cut, sizes, strict=True)]
    kept = kept_count(density, sum(sizes))
    lengths = lengths or [1] * len(sizes)
    low = protected_counts(sizes, min_per_layer, density, lengths)
    if first_dense:
        low[0] = sizes[0]
        if sum(low) > kept:
            fix = f"a dense first layer of {sizes[0]} weights is more than the {kept} that may stay; give a larger one"
            raise bad_value("mask.density", density, f"{fix}, or mask.allocation=erk")
    amounts = [a / length for a, length in zip(_within(shares, low, sizes, kept), lengths, strict=True)]
    counts = [math.floor(a) for a in amounts]
    left = kept - sum(map(operator.mul, counts, lengths))
    for i in sorted(range(len(amounts)), key=lambda i: (counts[i] - amounts[i], i)):
        if counts[i] < amounts[i] and lengths[i] <= left:
            counts[i], left = counts[i] + 1, left - lengths[i]
    return counts


def _within(shares: list[Fraction], low: list[int], high: list[int], total: int) -> list[Fraction]:
    """Amounts proportional to the shares but in [low, high], that add up to `total`."""
    fixed: dict[int, int] = {}
    while True:
        free = [i for i in range(len(shares)) if i not in fixed]
        left, whole = total - sum(fixed.values()), sum((shares[i] for i in free), Fraction(0))
        amounts = {i: left * shares[i] / whole for i in free}
        over = {i: high[i] for i in free if amounts[i] > high[i]}
        under = {i: low[i] for i in free if amounts[i] < low[i]}
        excess = sum((amounts[i] - high[i] for i in over), Fraction(0))
        lack = sum((low[i] - amounts[i] for i in under), Fraction(0))
        if not over and not under:
            return [Fraction(fixed[i]) if i in fixed else amounts[i] for i in range(len(shares))]
        # Only the side that outweighs the other is surely bound: fixing it moves the rest towards the other bound.
        fixed.update(over if excess >= lack else under)
