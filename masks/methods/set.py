"""set: a sparse network whose smallest weights move to random places (sparse evolutionary training)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.kernels.noise import hashed, uniforms
from ghostmask.masks.regrowing import Regrowing, RegrowingMethod, Regrown


@dataclass(frozen=True)
class Settings(Regrowing):
    """set."""


class ByChance(Regrown):
    """Grows anywhere, as numbers say that are functions of (seed, update, index)."""

    growing = False

    def promise(self, gradient: Tensor, part: Slice, updates: int) -> Tensor:
        key, drawn = hashed(f"growth {self.seed} {updates}", 8), torch.empty_like(gradient)
        for run, own in part.views(drawn):
            own.copy_(uniforms(key, run.first, run.numel, gradient.device))
        return drawn


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
