"""How do density and temperature change over a run: pure functions of the time t, in epochs or in any other unit."""

from __future__ import annotations

DECIDING, PAPER_RATE, LARGEST_RATE = 41.0, 6e-3, 0.12
"""Rate x steps with which nearly all probabilities end at 0 or 1, and the limits of a rate that is derived from it."""
DECIDED = 0.01
"""A probability this near to 0 or 1 counts as decided."""
FEW_DECIDED = 0.8
"""A search that ends with a smaller share of decided probabilities gets a warning."""

TRAVEL, LEAST_NOISE_RATE, LARGEST_NOISE_RATE = 20.0, 1e-3, 0.1
"""The same for the noise of Sparse VD and L0: a logarithm has some ten units to go."""


def cubic_density(t: float, start: float, end: float, target: float) -> float:
    """Density in [target, 1] at time t: 1 until `start`, falling as a cubic to `target` at `end`, constant after it.

    Equation 7 of ProbMask. GMP's sparsity s_f (1 - (1 - x)^3), x = (t - start) / (end - start), is one minus this with
    target = 1 - s_f. t may be fractional (per step instead of per epoch). With start = end it
    falls at once. Raises ValueError unless start <= end and 0 < target <= 1.
    """
    if start > end:
        raise ValueError(f"start = {start}: give at most end = {end}")
    if not 0 < target <= 1:
        raise ValueError(f"target = {target}: give a density in (0, 1]")
    if t >= end:
        return target
    if t < start:
        return 1.0
    left = 1 - (t - start) / (end - start)
    return target + (1 - target) * left**3


def linear_temperature(t: float, total: float, end: float = 0.03) -> float:
    """Temperature tau in [end, 1] at time t of `total`: (1 - end)(1 - t / total) + end (algorithm 1 of ProbMask).

    t beyond [0, total] counts as the nearer end. Raises ValueError unless total > 0 and 0 < end <= 1.
    """
    if not total > 0:
        raise ValueError(f"total = {total}: give a length above 0")
    if not 0 < end <= 1:
        raise ValueError(f"end = {end}: give a temperature in (0, 1]")
    fraction = min(max(t / total, 0.0), 1.0)
    return (1 - end) * (1 - fraction) + end


def probability_rate(steps: int) -> float:
    """Peak rate of Adam on the probabilities for a search of `steps` steps: rate x steps is DECIDING, within limits.

    The paper's own rate, which it gives for 58,800 steps, is the least; more than LARGEST_RATE at once costs more
    accuracy than undecided probabilities do (docs/results.md).
    """
    return min(max(DECIDING / max(steps, 1), PAPER_RATE), LARGEST_RATE)


def noise_rate(steps: int) -> float:
    """Peak rate of Adam on what says how noisy a weight is: in `steps` steps under a cosine it can go TRAVEL / 2 units,
    within limits."""
    return min(max(TRAVEL / max(steps, 1), LEAST_NOISE_RATE), LARGEST_NOISE_RATE)


def suggested_rate(lr: float, steps: int) -> float:
    """A rate with which `steps` steps decide (see probability_rate), and a higher one than lr."""
    return max(lr * 2, DECIDING / max(steps, 1))
