"""Weights under a random mask whose probabilities are trained: ProbMask's reparametrization, sharded.

    theta = w m,  m = sigmoid((log s - log(1 - s) + L) / tau),  L ~ Logistic(0, 1) by (seed, step, sample, index)
    s in C = {sum(s) <= K, 0 <= s <= 1} after every update, by the exact projection over all ranks (eq. 6)

Equations of "Effective Training of Sparse Neural Networks under Global Sparsity Constraint".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.sharding.reparametrization import Draw, State
from ghostmask.engine.sharding.rules import Adam, UpdateRule
from ghostmask.engine.sharding.slices import Run, Slice
from ghostmask.masks.kernels.noise import noise_key, uniforms
from ghostmask.masks.kernels.projection import project_
from ghostmask.masks.kernels.projection_costs import project_costs_
from ghostmask.masks.kernels.relaxed_mask import EPS, gradients_, masked_
from ghostmask.masks.masked import Masked
from ghostmask.masks.schedules import cubic_density, linear_temperature
from ghostmask.masks.scoring.topk import Budget, Units, largest
from ghostmask.masks.units.blocks import Kernels
from ghostmask.masks.units.parts import parts_of, with_whole_units

START = 1.0
"""The probability that every weight starts with."""


@dataclass(frozen=True)
class Search:
    """The schedules of a search, in epochs: temperature to temperature_end in the last one, density from 1 at `start`
    to `density` at `end`; steps_per_epoch: updates per epoch; seed: of ties and of the final sample; units: what is
    pruned as one, and what it costs (masks.granularity)."""

    density: float
    constraint: str
    temperature_end: float
    start: int
    end: int
    epochs: int
    steps_per_epoch: int
    seed: int
    units: Units | None = None

    def budget(self, density: float) -> Budget:
        """What a mask may keep at this density."""
        return Budget(density, self.constraint, seed=self.seed, units=self.units)

    def temperature(self, updates: int) -> float:
        """tau of update number `updates`, from 0; epochs count from 1, as in algorithm 1."""
        return linear_temperature(updates // self.steps_per_epoch + 1, self.epochs, self.temperature_end)

    def density_at(self, updates: int) -> float:
        """k of eq. 7 after update number `updates`, from 0; epochs count from 0, as in the authors' code."""
        return cubic_density(updates // self.steps_per_epoch, self.start, self.end, self.density)


class RelaxedMask(Masked):
    """State "weight" (frozen without a rule) and "probability" (Adam), every trained gradient from one fused kernel."""

    noisy = True
    differs_in_evaluation = True
    costly = True

    def __init__(self, search: Search, rule: UpdateRule | None, rate: float) -> None:
        """rate: learning rate of the probabilities as a multiple of the weights'."""
        trained: dict[str, UpdateRule] = {"weight": rule} if rule is not None else {}
        super().__init__({**trained, "probability": Adam()}, {"probability": rate})
        self.search = search
        self.temperature, self.density = search.temperature(0), search.density_at(0)
        self.threshold: Tensor | float = 0.0
        self.limit_share: Tensor | None = None
        self.watching = False
        """Whether `limit_share` is computed: the share of the squared gradient norm of s from elements at a limit."""
        self.fixed: Tensor | None = None
        """(n,) bool: once it is known, the mask that is delivered."""

    def start(self, weight: Tensor, part: Slice) -> State:
        return {"weight": weight, "probability": torch.full_like(weight, START)}

    def schedule(self, updates: int) -> None:
        self.temperature, self.density = self.search.temperature(updates), self.search.density_at(updates)

    def write(self, state: State, part: Slice, draw: Draw, outputs: list[tuple[Run, Tensor]]) -> None:
        key = noise_key(draw.seed, draw.step, draw.sample)
        for run, out in outputs:
            w, s = (state[n][run.start : run.start + run.numel] for n in ("weight", "probability"))
            masked_(out, w, s, run.first, key, self.temperature)

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        out = torch.empty_like(state["weight"])
        self.write(state, part, draw, list(part.views(out)))
        return out

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        key = noise_key(draw.seed, draw.step, draw.sample)
        slope = torch.empty_like(gradient)
        for run, g in part.views(gradient):
            own = slice(run.start, run.start + run.numel)
            w, s = state["weight"][own], state["probability"][own]
            gradients_(g, w, s, run.first, key, self.temperature, slope[own])
        found = {"weight": gradient, "probability": self.watched(slope, state, part)}
        return {name: found[name] for name in self.rules}

    def watched(self, slope: Tensor, state: State, part: Slice) -> Tensor:
        """Collective while `watching`: sets `limit_share`; returns dL/ds, (n,)."""
        if self.watching:
            s = state["probability"]
            at_limit = slope.where((s <= EPS) | (s >= 1 - EPS), 0.0)
            norms = [torch.linalg.vector_norm(x).double().square() for x in (at_limit, slope)]
            inside, total = part.world.all_reduce(torch.stack(norms))
            self.limit_share = inside / total.clamp(min=1e-300)
        return slope

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        """s <- proj_C(s), eq. 6, over the network or over each layer."""
        if isinstance(self.search.units, Kernels):
            self.threshold = self._constrain_cost(state, part, self.search.units)
            return
        s, numels = state["probability"], [part.total]
        runs = [[(own, run.first) for run, own in part.views(s)]]
        if self.search.constraint == "layerwise":
            numels = part.layout.numels
            begins = [sum(numels[:i]) for i in range(len(numels))]
            runs = [[] for _ in numels]
            for x in part.segments:
                runs[x.layer].append((s[x.start : x.start + x.numel], begins[x.layer] + x.offset))
        self.threshold = project_(runs, [self.density * n for n in numels], numels, part.world).mean()

    def _constrain_cost(self, state: State, part: Slice, units: Kernels) -> Tensor:
        """Onto {sum over units of cost x s <= density x the cost of all}, evenly: shifts that grow with the cost empty
        the early layers (D109). Over the units that begin here; the other weights of a kernel then follow its first."""
        s, costs, parts = state["probability"], units.costs(part), list(parts_of(part, units.lengths))
        owned = [x.owned(s).contiguous() for x in parts]
        layers: list[list[tuple[Tensor, int]]] = [[] for _ in costs]
        for x, own in zip(parts, owned, strict=True):
            layers[x.segment.layer].append((own, x.number + x.cut))
        if self.search.constraint == "layerwise":
            numbers = [number for _, number in costs]
            threshold = project_(layers, [self.density * n for n in numbers], numbers, part.world).mean()
        else:
            priced: dict[int, list[tuple[Tensor, int]]] = {cost: [] for cost, _ in costs}
            for (cost, _), runs in zip(costs, layers, strict=True):
                priced[cost] += runs
            budget = self.density * sum(cost * number for cost, number in costs)
            threshold = project_costs_(priced, budget, part.world, even=True)
        if max(units.lengths.values()) > 1:
            for x, own in zip(parts, owned, strict=True):
                x.owned(s).copy_(own)
            for x, rows in with_whole_units(part, s, units.lengths):
                if x.length > 1:
                    x.of(s).copy_(x.spread(rows[:, 0]))
        return threshold

    def mask(self, state: State, part: Slice) -> Tensor:
        """(n,) bool: the round(density n) most probable weights, at the present density, or what was fixed."""
        return largest(part, state["probability"], self._budget()) if self.fixed is None else self.fixed

    def due(self, part: Slice) -> Sequence[int] | None:
        return self._budget().counts(part.layout.numels) if self.fixed is None else None

    def spread(self, state: State, part: Slice) -> Tensor:
        """(n,) the probability that each weight of this slice is kept."""
        return state["probability"]

    def _budget(self) -> Budget:
        return self.search.budget(self.density)

    def sampled(self, state: State, part: Slice, candidate: int) -> Tensor:
        """(n,) bool: m ~ Bernoulli(s), a function of (seed, candidate, index)."""
        key, s = noise_key(self.search.seed, -1, candidate), state["probability"]
        mask = torch.empty_like(s, dtype=torch.bool)
        for run, own in part.views(s):
            mask[run.start : run.start + run.numel] = uniforms(key, run.first, run.numel, s.device) < own
        return mask
