"""Weights under a random mask of whole kernels whose probabilities are trained: ProbMask with a number per kernel.

    theta_k = w_k m_k,  m_k = sigmoid((log s_k - log(1 - s_k) + L_k) / tau),  L ~ Logistic(0, 1) by kernel
    dL/ds_k = 4 / tau m_k (1 - m_k) sum over the kernel's weights of g w
    sum of costs c_k s_k <= density x cost of all  by s <- clamp(z - v, 0, 1) after every update

k: a kernel between one input and one output channel; c_k: its weights, times their uses under mask.budget=flops. Its
probability belongs to the rank that holds its first weight; the other weights hold copies, so that the state has the
form, and the memory, that it has with a probability per weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostmask.engine.sharding.reparametrization import Draw, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Run, Slice
from ghostmask.masks.kernels.noise import noise_key, uniforms
from ghostmask.masks.kernels.relaxed_mask import gradients_, masked_
from ghostmask.masks.relaxed import RelaxedMask, Search
from ghostmask.masks.units.blocks import Kernels
from ghostmask.masks.units.parts import parts_of, unit_sums, with_whole_units


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
                    continue
                mask = torch.empty_like(s)
                masked_(mask, torch.ones_like(s), s, x.number, key, self.temperature)
                own.copy_(w * x.spread(mask))

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        key = noise_key(draw.seed, draw.step, draw.sample)
        slope = gradient * state["weight"]
        for x, rows in with_whole_units(part, slope, self.units.lengths):
            s, g = x.each(state["probability"]), x.of(gradient)
            if x.length == 1:
                gradients_(g, x.of(state["weight"]), s, x.number, key, self.temperature, x.of(slope))
                continue
            mask, slopes = torch.ones_like(s), torch.empty_like(s)
            gradients_(mask, unit_sums(rows).float(), s, x.number, key, self.temperature, slopes)
            g.mul_(x.spread(mask))
            x.of(slope).zero_()
            x.owned(slope).copy_(slopes[x.cut :])
        found = {"weight": gradient, "probability": self.watched(slope, state, part)}
        return {name: found[name] for name in self.rules}

    def sampled(self, state: State, part: Slice, candidate: int) -> Tensor:
        key, s = noise_key(self.search.seed, -1, candidate), state["probability"]
        mask = torch.empty_like(s, dtype=torch.bool)
        for x in parts_of(part, self.units.lengths):
            x.of(mask).copy_(x.spread(uniforms(key, x.number, x.count, s.device) < x.each(s)))
        return mask
