"""The learning rate as a function of the step: warm-up, then cosine, steps or constant."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRate:
    """Factor on every group's base rate; a pure function, so a resume needs nothing from it.

    total, warmup and milestones are optimizer steps of one phase.
    """

    schedule: str
    total: int
    warmup: int = 0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def factor(self, step: int) -> float:
        """The factor for the update number `step` (from 0) of the phase, in (0, 1]."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "cosine":
            done = (step - self.warmup) / max(1, self.total - self.warmup)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        if self.schedule == "step":
            return float(self.gamma ** sum(step >= m for m in self.milestones))
        return 1.0
