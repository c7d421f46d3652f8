"""dnw: the largest |w| of every layer, cut anew at every step; the gradient goes to all weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Reparametrization, State
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.settings import Protecting, WithPower, choice
from ghostmask.masks.straight_through import CutEveryStep, StraightThrough


@dataclass(frozen=True)
class Settings(Protecting, WithPower):
    """dnw."""

    constraint: str = choice("layerwise", "global")
    """layerwise (the same density in every layer, as in the paper) or global (one budget for the network)."""


class Dnw(CutEveryStep):
    """Discovering Neural Wirings (Wortsman et al. 2019) of a given network: theta = w m, m = the largest |w| of each
    layer, after every update; dL/dw = dL/dtheta for all w. In the paper's other variant the first layer stays dense:
    mask.dense_layers=[conv1.weight]."""

    Settings = Settings
    paper = 'Wortsman et al. 2019, "Discovering neural wirings", https://arxiv.org/abs/1906.00586'
    aliases = ("discovering_neural_wirings", "topk")

    def reparametrization(self, phase: Phase) -> Reparametrization:
        return Largest(self.rule(), self.budget())


class Largest(StraightThrough):
    """theta = w m."""

    def shown(self, state: State, part: Slice) -> Tensor:
        return torch.where(state["mask"], state["weight"], 0.0)
