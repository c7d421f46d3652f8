"""gmp: gradual magnitude pruning, the mask shrinks along a cubic schedule while the network trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ghostmask.engine.config import require_number
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Reparametrization, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.schedules import cubic_density
from ghostmask.masks.scoring.largest import Budget, largest
from ghostmask.masks.settings import Ranked, Scheduled


@dataclass(frozen=True)
class Settings(Ranked, Scheduled):
    """gmp."""

    update_every: int = 100
    """Optimizer steps between updates of the mask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("mask.update_every", self.update_every, 1)


class GradualMagnitude(MaskMethod):
    """GMP (Zhu & Gupta 2017): every mask.update_every steps between mask.start_fraction and mask.end_fraction of
    training, the masks are chosen anew as the largest |w| at density 1 - (1 - density)(1 - (1 - x)^3)."""

    Settings = Settings
    searches = True

    def reparametrization(self, phase: Phase) -> Reparametrization:
        s, total = self.settings, phase.epochs * phase.steps_per_epoch
        budget = Budget(s.density, s.constraint, seed=self.recipe.seed)
        return Shrinking(self.rule(), budget, s.start_fraction * total, s.end_fraction * total, s.update_every)


class Shrinking(FixedMask):
    """A mask of the largest |w| that falls to the budget between two updates; a pruned weight keeps its last value, so
    it may return. start, end: in updates, rounded."""

    def __init__(self, rule: UpdateRule, budget: Budget, start: float, end: float, every: int) -> None:
        super().__init__(rule)
        self.budget, self.every = budget, every
        self.first, self.last = round(start), round(end)

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        if not self.first <= updates <= self.last:
            return
        if (updates - self.first) % self.every == 0 or updates == self.last:
            density = cubic_density(updates, self.first, self.last, self.budget.density)
            state["mask"].copy_(largest(part, state["weight"].abs(), replace(self.budget, density=density)))
