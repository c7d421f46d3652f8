"""Weights under a random mask of whole channels whose probabilities are trained: ProbMask with a number per channel.

    theta_oi = w_oi m_o m_i,  m_c = sigmoid((log s_c - log(1 - s_c) + L_c) / tau),  L ~ Logistic(0, 1) by channel
    sum over weights of E[m_o m_i] = sum over layers l of u_l K_l sum(s_o) sum(s_i) <= K  after every update

The expected cost (see `masks.units.channels`) is held to the budget by s <- clamp(z - v c, 0, 1) with the one v >= 0
that meets it; c = 1, so that a channel's probability moves as one weight's does. Groups of weights that share a
probability are what Zhou et al. trained in "Efficient Neural Network Training via Forward and Backward Propagation
Sparsification" (VRPGE) too. The row alone would not do: batch norm takes the scale of an output channel away again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostmask.engine.sharding.reparametrization import Draw, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Run, Slice
from ghostmask.engine.sharding.spans import Spans
from ghostmask.masks.kernels.noise import noise_key, uniforms
from ghostmask.masks.kernels.relaxed_mask import EPS, gradients_, masked_
from ghostmask.masks.relaxed import START, RelaxedMask, Search
from ghostmask.masks.units.channels import Channels
from ghostmask.masks.units.columns import column_sums

HALVINGS = 48
"""Of the interval that holds v."""


class RelaxedChannels(RelaxedMask):
    """State "weight" and, whole on every rank, "probability": one per channel that can be removed."""

    whole = ("probability",)

    def __init__(self, search: Search, rule: UpdateRule | None, rate: float, units: Channels) -> None:
        super().__init__(search, rule, rate)
        self.units = units

    def start(self, weight: Tensor, part: Slice) -> State:
        return {"weight": weight, "probability": weight.new_full((self.units.count,), START)}

    def write(self, state: State, part: Slice, draw: Draw, outputs: list[tuple[Run, Tensor]]) -> None:
        rows, columns = self.units.of_elements(part, Spans.channels(part), self._masks(state, draw))
        theta = rows.mul_(columns).mul_(state["weight"])
        for run, out in outputs:
            out.copy_(theta[run.start : run.start + run.numel])

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        spans, s = Spans.channels(part), state["probability"]
        rows, columns = self.units.of_elements(part, spans, self._masks(state, draw))
        slope = gradient * state["weight"]
        by_row = self.units.of_channels(spans.sums(slope * columns))
        by_column = self._of_columns(*column_sums(part, slope.mul_(rows)))
        total, slopes = (by_row + by_column).float(), torch.empty_like(s)
        gradients_(
            total, torch.ones_like(s), s, 0, noise_key(draw.seed, draw.step, draw.sample), self.temperature, slopes
        )
        if self.watching:
            squares = slopes.double().square()
            at_limit = squares.where((s <= EPS) | (s >= 1 - EPS), 0.0)
            self.limit_share = at_limit.sum() / squares.sum().clamp(min=1e-300)
        found = {"weight": gradient.mul_(rows).mul_(columns), "probability": slopes}
        return {name: found[name] for name in self.rules}

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        """s <- clamp(z - v, 0, 1) with the v >= 0 at which the expected cost is the budget's, or 0 if it is less."""
        z = state["probability"].double()
        most, budget = self.units.expected(torch.ones_like(z)), self.density
        low, high = torch.zeros((), dtype=z.dtype, device=z.device), z.max().clamp(min=0)
        binding = self.units.expected(z.clamp(0, 1)) > budget * most
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = self.units.expected((z - middle).clamp(0, 1)) > budget * most
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        self.threshold = torch.where(binding, high, 0.0)
        state["probability"].copy_((z - self.threshold).clamp(0, 1))

    def mask(self, state: State, part: Slice) -> Tensor:
        if self.fixed is not None:
            return self.fixed
        kept = self.units.chosen(state["probability"], self.search.budget(self.density))
        return self.units.mask(part, Spans.channels(part), kept)

    def sampled(self, state: State, part: Slice, candidate: int) -> Tensor:
        s = state["probability"]
        kept = uniforms(noise_key(self.search.seed, -1, candidate), 0, len(s), s.device) < s
        return self.units.mask(part, Spans.channels(part), kept)

    def spread(self, state: State, part: Slice) -> Tensor:
        rows, columns = self.units.of_elements(part, Spans.channels(part), state["probability"])
        return rows.mul_(columns)

    def _masks(self, state: State, draw: Draw) -> Tensor:
        """(count,) the relaxed mask of every channel."""
        s = state["probability"]
        out = torch.empty_like(s)
        masked_(out, torch.ones_like(s), s, 0, noise_key(draw.seed, draw.step, draw.sample), self.temperature)
        return out

    def _of_columns(self, sums: dict[str, Tensor], unit: Tensor) -> Tensor:
        """(count,) float64: the sum over each channel's columns."""
        total = torch.zeros(self.units.count + 1, dtype=torch.int64, device=unit.device)
        for name, numbers in self.units.columns(unit.device).items():
            total.index_add_(0, numbers, sums[name])
        return total[:-1].double() * unit
