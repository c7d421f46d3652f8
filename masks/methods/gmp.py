"""gmp: gradual magnitude pruning, the mask shrinks along a cubic schedule while the network trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Reparametrization, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.schedules import cubic_density
from ghostmask.masks.scoring.topk import Budget, largest
from ghostmask.masks.settings import Protecting, Scheduled, WithPower, number


@dataclass(frozen=True)
class Settings(Protecting, Scheduled, WithPower):
    """gmp."""

    start_fraction: float = number(0.16, 0, 1)
    """Where the density begins to fall (the paper's t0), as a fraction of train.epochs. The default is ProbMask's, for
    comparison; published runs on ImageNet have 0.2."""
    end_fraction: float = number(0.6, 0, 1)
    """Where the density is reached (the paper's t0 + n dt), as a fraction of train.epochs; published: 0.79."""
    update_every: int = number(100, 1)
    """Optimizer steps between updates of the mask."""


class GradualMagnitude(MaskMethod):
    """GMP (Zhu & Gupta 2017): every mask.update_every steps between mask.start_fraction and mask.end_fraction of
    training, the masks are chosen anew as the largest |w| at density 1 - (1 - density)(1 - (1 - x)^3)."""

    Settings = Settings
    searches = True
    paper = (
        'Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression", '
        "https://arxiv.org/abs/1710.01878"
    )
    aliases = ("gradual", "gradual_magnitude", "agp", "cubic", "powerprop mask.power=2.0")

    @classmethod
    def check_steps(cls, settings: Any, run: Any, steps_per_epoch: int) -> None:
        settings.require_fall("train.epochs", run.train.epochs, lambda epochs: settings.falls(epochs * steps_per_epoch))

    def reparametrization(self, phase: Phase) -> Reparametrization:
        s = self.settings
        first, last = s.window(round, phase.epochs * phase.steps_per_epoch)
        return Shrinking(self.rule(), self.budget(), first, last, s.update_every)


class Shrinking(FixedMask):
    """A mask of the largest |w| that falls to the budget between two updates.

    A pruned weight is kept and may return; without a gradient only its momentum and weight decay move it. first, last:
    the updates, counted from 1, after which the density is 1 and the budget's.
    """

    def __init__(self, rule: UpdateRule, budget: Budget, first: int, last: int, every: int) -> None:
        super().__init__(rule)
        self.density = 1.0
        self.budget, self.every, self.first, self.last = budget, every, first, last

    def schedule(self, updates: int) -> None:
        decided = updates if updates >= self.last else updates - (updates - self.first) % self.every
        self.density = cubic_density(decided, self.first, self.last, self.budget.density)

    def decides(self, updates: int) -> bool:
        inside = self.first <= updates <= self.last
        return inside and ((updates - self.first) % self.every == 0 or updates == self.last)

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        if self.decides(updates):
            self.schedule(updates)
            budget = replace(self.budget, density=self.density)
            state["mask"].copy_(largest(part, state["weight"].abs(), budget, wait=False))

    def due(self, part: Slice) -> Sequence[int] | None:
        return replace(self.budget, density=self.density).counts(part.layout.numels)
