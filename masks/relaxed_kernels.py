"""Weights under a random mask of whole kernels whose probabilities are trained: ProbMask with a number per kernel.

    theta_k = w_k m_k,  m_k = sigmoid((log s_k - log(1 - s_k) + L_k) / tau),  L ~ Logistic(0, 1) by kernel
    dL/ds_k = 4 / tau m_k (1 - m_k) sum over the kernel's weights of g w
    sum of costs c_k s_k <= density x cost of all  by s <- clamp(z - v, 0, 1) after every update

k: a kernel between one input and one output channel; c_k: its weights, times their uses under mask.budget=flops. Its
probability belongs to the rank that holds its first weight; the other weights hold copies, so that the state has the
form, and the memory, that it has with a probability per weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostmask.engine.sharding.reparametrization import Draw, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Run, Slice
from ghostmask.masks.kernels.noise import noise_key, uniforms
from ghostmask.masks.kernels.projection import project_
from ghostmask.masks.kernels.projection_costs import project_costs_
from ghostmask.masks.kernels.relaxed_mask import gradients_, masked_
from ghostmask.masks.relaxed import RelaxedMask, Search
from ghostmask.masks.units.blocks import Kernels
from ghostmask.masks.units.parts import Part, parts_of, unit_sums, with_whole_units


class RelaxedKernels(RelaxedMask):
    """State "weight" and "probability", (n,) each; all weights of a kernel have the same probability."""

    def __init__(self, search: Search, rule: UpdateRule | None, rate: float, units: Kernels) -> None:
        super().__init__(search, rule, rate)
        self.units = units

    def write(self, state: State, part: Slice, draw: Draw, outputs: list[tuple[Run, Tensor]]) -> None:
        key = noise_key(draw.seed, draw.step, draw.sample)
        for run, out in outputs:
            for x in parts_of(part, self.units.lengths, [run]):
                begin, w, s = x.segment.start - run.start, x.of(state["weight"]), x.each(state["probability"])
                own = out[begin : begin + x.segment.numel]
                if x.length == 1:
                    masked_(own, w, s, x.number, key, self.temperature)
                else:
                    own.copy_(w * x.spread(self._masks(s, x, key)))

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        key = noise_key(draw.seed, draw.step, draw.sample)
        slope = gradient * state["weight"]
        for x, rows in with_whole_units(part, slope, self.units.lengths):
            s = x.each(state["probability"])
            total, slopes = unit_sums(rows).float(), torch.empty_like(s)
            gradients_(total, torch.ones_like(s), s, x.number, key, self.temperature, slopes)
            x.of(gradient).mul_(x.spread(self._masks(s, x, key)))
            x.of(slope).zero_()
            x.owned(slope).copy_(slopes[x.cut :])
        found = {"weight": gradient, "probability": self.watched(slope, state, part)}
        return {name: found[name] for name in self.rules}

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        """s <- proj_C(s) with costs, over the network or over each layer; then a kernel's other weights follow."""
        s = state["probability"]
        parts = list(parts_of(part, self.units.lengths))
        owned = [x.owned(s).contiguous() for x in parts]
        self.threshold = self._project(parts, owned, part)
        for x, projected in zip(parts, owned, strict=True):
            x.owned(s).copy_(projected)
        for x, rows in with_whole_units(part, s, self.units.lengths):
            if x.length > 1:
                x.of(s).copy_(x.spread(rows[:, 0]))

    def sampled(self, state: State, part: Slice, candidate: int) -> Tensor:
        key, s = noise_key(self.search.seed, -1, candidate), state["probability"]
        mask = torch.empty_like(s, dtype=torch.bool)
        for x in parts_of(part, self.units.lengths):
            x.of(mask).copy_(x.spread(uniforms(key, x.number, x.count, s.device) < x.each(s)))
        return mask

    def _project(self, parts: Sequence[Part], owned: Sequence[Tensor], part: Slice) -> Tensor:
        """Collective: the kernels that begin in each part, in place; returns v (of layers: their mean)."""
        costs, layers = self.units.costs(part), [x.segment.layer for x in parts]
        runs: list[list[tuple[Tensor, int]]] = [[] for _ in costs]
        for x, layer, own in zip(parts, layers, owned, strict=True):
            runs[layer].append((own, x.number + x.cut))
        if self.search.constraint == "layerwise":
            numbers = [number for _, number in costs]
            return project_(runs, [self.density * n for n in numbers], numbers, part.world).mean()
        priced: dict[int, list[tuple[Tensor, int]]] = {cost: [] for cost, _ in costs}
        for (cost, _), layer_runs in zip(costs, runs, strict=True):
            priced[cost] += layer_runs
        budget = self.density * sum(cost * number for cost, number in costs)
        return project_costs_(priced, budget, part.world, even=True)

    def _masks(self, s: Tensor, x: Part, key: int) -> Tensor:
        """(count,) the relaxed mask of each kernel."""
        out = torch.empty_like(s)
        masked_(out, torch.ones_like(s), s, x.number, key, self.temperature)
        return out
