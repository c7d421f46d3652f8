"""set: a sparse network whose smallest weights move to random places (sparse evolutionary training)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.drawn import random_numbers
from ghostmask.masks.regrowing import Regrowing, RegrowingMethod, Regrown


@dataclass(frozen=True)
class Settings(Regrowing):
    """set."""


class ByChance(Regrown):
    """Grows anywhere, as numbers say that are functions of (seed, update, index)."""

    growing = False

    def promise(self, gradient: Tensor, part: Slice, updates: int) -> Tensor:
        return random_numbers(part, f"growth {self.seed} {updates}")


class Set(RegrowingMethod):
    """SET (Mocanu et al. 2018): every mask.update_every steps the smallest weights of each layer move to random places,
    on RigL's schedule (the paper's own: after every epoch, 0.3 of them throughout)."""

    Settings = Settings
    paper = (
        'Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity '
        'inspired by network science", https://arxiv.org/abs/1707.04780'
    )
    aliases = ("evolutionary",)
    form = ByChance
