"""acdc: dense and compressed phases take turns; the network leaves the last, compressed one, trained in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ghostmask.engine.config import require
from ghostmask.engine.errors import bad_value
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Reparametrization, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.masked import ChangingMask
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.scoring.topk import Budget, largest
from ghostmask.masks.settings import Protecting, number, shortest


@dataclass(frozen=True)
class Settings(Protecting):
    """acdc: fractions of train.epochs; the defaults are the paper's for ImageNet, epochs 10, 5, 75 and 85 of 100."""

    first_fraction: float = number(0.1, 0, 1, above=True)
    """Where the first compressed phase begins; before it, everything is dense."""
    phase_fraction: float = number(0.05, 0.001, 1)
    """Length of the phases that follow: compressed, dense, compressed, ..."""
    last_dense_fraction: float = number(0.75, 0, 1)
    """Where the last dense phase begins, whatever the turn is."""
    last_fraction: float = number(0.85, 0, 1)
    """Where the last phase begins: compressed, until the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("first_fraction", "last_dense_fraction", "last_fraction")
        for name, later in pairwise(names):
            value, limit = getattr(self, name), getattr(self, later)
            require(value < limit, f"mask.{name}", value, f"give less than mask.{later} = {limit:g}")
        require(self.last_fraction < 1, "mask.last_fraction", self.last_fraction, "give less than 1")


class AcDc(MaskMethod):
    """AC/DC (Peste et al. 2021): in compressed phases the weights that were the largest |w| at the phase's start train
    alone, the others become 0; in dense ones all train, from where they are. Momentum starts anew with every phase.

    An evaluation at a phase's end sees the network of the next one: just cut, where that is compressed.
    """

    Settings = Settings
    paper = (
        'Peste et al. 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks", '
        "https://arxiv.org/abs/2106.12379"
    )
    aliases = ("ac/dc", "alternating", "iht")
    searches = True

    @classmethod
    def check_steps(cls, settings: Any, run: Any, steps_per_epoch: int) -> None:
        epochs = run.train.epochs
        if fits(settings, epochs * steps_per_epoch):
            return
        enough = shortest(lambda length: fits(settings, length * steps_per_epoch))
        why = f"some of AC/DC's phases (mask.phase_fraction = {settings.phase_fraction:g}) have no step"
        fix = f"give at least {enough}" if enough else "give fractions that lie further apart"
        raise bad_value("train.epochs", epochs, f"{why}; {fix}, or longer phases")

    def reparametrization(self, phase: Phase) -> Reparametrization:
        s = self.settings
        return Alternating(self.rule(), self.budget(), changes(s, phase.epochs * phase.steps_per_epoch))


class Alternating(ChangingMask):
    """theta = w m, m all True in dense phases. phases: see `changes`."""

    def __init__(self, rule: UpdateRule, budget: Budget, phases: Sequence[tuple[int, bool]]) -> None:
        super().__init__(rule)
        self.budget, self.phases, self.compressed = budget, dict(phases), False

    def schedule(self, updates: int) -> None:
        before = [compressed for update, compressed in self.phases.items() if update <= updates]
        self.compressed = bool(before) and before[-1]

    def decides(self, updates: int) -> bool:
        return updates in self.phases

    def restarts(self, updates: int) -> bool:
        return updates in self.phases

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        if self.phases.get(updates):
            self.lay(state, largest(part, state["weight"].abs(), self.budget))
        elif updates in self.phases:
            state["mask"].fill_(True)

    def due(self, part: Slice) -> Sequence[int] | None:
        return self.budget.counts(part.layout.numels) if self.compressed else [part.total]


def changes(settings: Settings, steps: int) -> list[tuple[int, bool]]:
    """(update number, from 1, after which a phase begins; whether it is compressed), of all but the first phase."""
    first, length, dense = settings.first_fraction, settings.phase_fraction, settings.last_dense_fraction
    turns = math.ceil((dense - first) / length - 1e-9)
    found = [(round((first + length * turn) * steps), turn % 2 == 0) for turn in range(turns)]
    found += [(round(dense * steps), False)] if turns % 2 else []  # else it is dense already
    return [*found, (round(settings.last_fraction * steps), True)]


def fits(settings: Settings, steps: int) -> bool:
    """Whether every phase has a step."""
    ends = [0, *(update for update, _ in changes(settings, steps)), steps]
    return all(a < b for a, b in pairwise(ends))
