"""From tables of breakpoints: in which bin does each budget's threshold lie, and where in it?

CUDA: one Triton kernel per round; CPU: numba; elsewhere torch. What they compute is small, but takes sixty torch
operations a round: a millisecond of the host's time in all, which the projection itself does not take on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.compiled import kernels_on


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
        kernels = kernels_on(tables.device, "ghostmask.masks.kernels.projection")
        if kernels:
            kernels.narrow(tables, shift, self.budget, self.base, self.slope, self.value, self.lowest)
        else:
            _narrow(tables, shift, self)

    def roots(self) -> Tensor:
        """The thresholds, once a bin is one float32 number wide: no breakpoint lies inside it, f is a straight line."""
        low, high = _floats(self.base), _floats(self.base + 1)
        root = high - (self.budget - self.value) / self.slope
        return torch.where(self.slope > 0, root.clamp(low, high), low)


def _narrow(tables: Tensor, shift: int, brackets: Brackets) -> None:
    counts, remainders = tables[:, 0, :-1], tables[:, 1, :-1]
    bins = counts.shape[1]
    base, slope, value = brackets.base * bins, brackets.slope[:, None], brackets.value[:, None]
    steps = torch.arange(bins + 1, device=tables.device)
    widths = _floats((base[:, None] + steps) << shift).diff()
    above = slope + _from_above(counts) - counts
    # f(lower edge) - f(upper edge): breakpoints above the bin act over its whole width, one inside it over its
    # distance from the lower edge, which is its remainder. Exact in float64, product by product.
    rises = above * widths + remainders * (widths / (1 << shift))
    values = torch.cat([value + _from_above(rises), value], 1)
    place = ((values[:, :-1] > brackets.budget[:, None]).sum(1, keepdim=True) - 1).clamp_(min=0)
    brackets.base.copy_(base + place[:, 0])
    brackets.slope.copy_(above.gather(1, place)[:, 0])
    brackets.value.copy_(values.gather(1, place + 1)[:, 0])
    brackets.lowest.copy_(values[:, 0])


def _from_above(values: Tensor) -> Tensor:
    return values.flip(1).cumsum(1).flip(1)


def _floats(images: Tensor) -> Tensor:
    return images.int().view(torch.float32).double()
