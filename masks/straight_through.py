"""Masks that are cut anew after every update, under which all weights keep on learning: straight-through estimators.

    theta = f(w, m),  m = the largest scores at the present density,  dL/d(trained) = slope dL/dtheta, also where m = 0

The mask is decided once per update, by all ranks together, and lies in the state: training, evaluation and what is
delivered see the same one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Draw, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.sharding.spans import CHUNKS
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.schedules import cubic_density
from ghostmask.masks.scoring.topk import Budget, largest
from ghostmask.masks.settings import InUnits, Scheduled, granularity
from ghostmask.masks.units.blocks import Blocks

NO_THRESHOLD = (
    "a threshold is of single weights, which shrink by the largest |w| that is pruned; use weight, N:M such as 2:4, or "
    "mask.method=dnw or gmp"
)


class StraightThrough(FixedMask):
    """State "weight" and "mask"; the density falls from 1 after `first` updates to the budget's after `last`."""

    def __init__(self, rule: UpdateRule, budget: Budget, first: int = 0, last: int = 0) -> None:
        super().__init__(rule)
        self.budget, self.first, self.last = budget, first, last
        self.density = self.density_at(0)

    def density_at(self, updates: int) -> float:
        """After so many updates: s_f (1 - (1 - x)^3) is the sparsity, x = (updates - first) / (last - first)."""
        return cubic_density(updates, self.first, self.last, self.budget.density)

    def scores(self, state: State, part: Slice) -> Tensor:
        """(n,) the larger, the sooner kept: |w|."""
        return state["weight"].abs()

    @abstractmethod
    def shown(self, state: State, part: Slice) -> Tensor:
        """(n,) theta, 0 where the mask is False."""

    def passing(self, state: State) -> Tensor:
        """(n,) whose derivative by the trained state takes the place of theta's: w."""
        return state["weight"]

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        theta, passing = self.shown(state, part).detach(), self.passing(state)
        return theta + (passing - passing.detach()) if passing.requires_grad else theta

    def evaluation_weights(self, state: State, part: Slice) -> Tensor:
        return self.shown(state, part)

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        return {"weight": gradient}

    def start(self, weight: Tensor, part: Slice) -> State:
        state = super().start(weight, part) | self.more(weight, part)
        self.cut(state, part)
        return state

    def more(self, weight: Tensor, part: Slice) -> State:
        """State beyond weight and mask, before the first cut."""
        return {}

    def schedule(self, updates: int) -> None:
        self.density = self.density_at(updates)

    def due(self, part: Slice) -> Sequence[int] | None:
        return replace(self.budget, density=self.density).counts(part.layout.numels)

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        self.schedule(updates)
        self.cut(state, part)

    def scale(self, state: State, part: Slice, factors: Any) -> None:
        super().scale(state, part, factors)
        self.cut(state, part)

    def cut(self, state: State, part: Slice) -> Tensor:
        """Collective: decide the mask at the present density; returns the scores."""
        scores = self.scores(state, part)
        if self.density == 1:
            state["mask"].fill_(True)
        else:
            budget = replace(self.budget, density=self.density)
            state["mask"].copy_(largest(part, scores, budget, wait=False))
        return scores


@dataclass(frozen=True)
class Thresholding(InUnits, Scheduled):
    """A method of a `Thresholded` form."""

    granularity: str = granularity(dict.fromkeys(("kernel", "channel"), NO_THRESHOLD))
    """weight, or N:M such as 2:4: of M neighbouring input channels the N largest |w| stay, in every block, which has a
    threshold of its own; that decides the density. Takes 4 bytes more per weight, shared by the ranks."""


class Thresholded(StraightThrough):
    """theta = `above(|w|)` with the sign of w, over a threshold: the largest score that is pruned, or 0.

    State "threshold", (1,), of all layers; with N:M "thresholds", (n,), of each weight's block (with a soft threshold:
    S-STE, Hu et al. 2024, "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training",
    https://arxiv.org/abs/2409.09099).
    """

    whole: ClassVar[tuple[str, ...]] = ("threshold",)

    def more(self, weight: Tensor, part: Slice) -> State:
        if self.budget.units is not None:
            return {"thresholds": torch.zeros_like(weight)}
        return {"threshold": weight.new_zeros(1)}

    @abstractmethod
    def above(self, magnitude: Tensor, threshold: Tensor) -> Tensor:
        """|theta| of weights of that |w|, which may be overwritten, with no more than rounding below the threshold."""

    def shown(self, state: State, part: Slice) -> Tensor:
        w, mask, thresholds = state["weight"], state["mask"], self.thresholds(state, part)
        theta = torch.empty_like(w)
        for own in _pieces(w):
            t = thresholds if len(thresholds) == 1 else thresholds[own]
            theta[own] = torch.where(mask[own], self.above(w[own].abs(), t).copysign(w[own]), 0.0)
        return theta

    def thresholds(self, state: State, part: Slice) -> Tensor:
        """(1,) or (n,): what |w| is held against."""
        return state["threshold" if self.budget.units is None else "thresholds"]

    def cut(self, state: State, part: Slice) -> Tensor:
        scores, mask = super().cut(state, part), state["mask"]
        if (units := self.budget.units) is not None:
            assert isinstance(units, Blocks)
            state["thresholds"].copy_(units.pruned(part, scores, mask))
            return scores
        most = scores.new_zeros(1)
        for own in _pieces(scores):
            torch.maximum(most, torch.where(mask[own], 0.0, scores[own]).amax(), out=most)
        state["threshold"].copy_(part.world.all_reduce(most, dist.ReduceOp.MAX))
        return scores


def _pieces(tensor: Tensor) -> Iterator[slice]:
    """Ranges of a vector that are computed at a time, so that what is between stays in the CPU's cache."""
    size = CHUNKS[tensor.device.type]
    for start in range(0, len(tensor), size):
        yield slice(start, start + size)


class CutEveryStep(MaskMethod):
    """A method whose main phase trains a `StraightThrough` form."""

    searches = True

    @classmethod
    def ends_under_one_mask(cls, settings: Any, run: Any) -> bool:
        return bool(cls.finetunes and run.finetune.epochs > 0)

    @classmethod
    def check_steps(cls, settings: Any, run: Any, steps_per_epoch: int) -> None:
        if hasattr(settings, "window"):
            epochs, name = run.train.epochs, "train.epochs"
            settings.require_fall(name, epochs, lambda n: settings.falls(n * steps_per_epoch))

    def window(self, phase: Phase) -> tuple[int, int]:
        """The updates after which the density begins to fall and is reached."""
        first, last = self.settings.window(round, phase.epochs * phase.steps_per_epoch)
        return int(first), int(last)
