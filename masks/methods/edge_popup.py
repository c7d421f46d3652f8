"""edge_popup: a supermask; the weights stay as they were drawn, only scores learn which of them remain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.init import calculate_gain

from ghostmask.engine.config import require
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.kernels.noise import generator, noise_key, uniforms
from ghostmask.masks.masked import PRUNABLE
from ghostmask.masks.scoring.topk import Budget
from ghostmask.masks.settings import Protecting, choice
from ghostmask.masks.straight_through import CutEveryStep, StraightThrough

SCORES = -2
"""In the place of a step's number in the key of the scores' initialisation."""


@dataclass(frozen=True)
class Settings(Protecting):
    """edge_popup."""

    constraint: str = choice("layerwise", "global")
    """layerwise (the same density in every layer, as in the paper) or global (one budget for the network)."""
    init: str = choice("kaiming_normal", "signed_constant")
    """What the weights are: normal, or all of one size with random signs; standard deviation or size is
    sqrt(2 / (density fan_in)), which is Kaiming's for the fan that is kept."""


class EdgePopup(CutEveryStep):
    """Edge-popup (Ramanujan et al. 2020): theta = w m, m = the largest |score| of each layer, after every update.

    dL/dscore = w dL/dtheta sign(score), for all scores: m is taken for |score|, as in the authors' code (the paper's
    text leaves the absolute value out). Nothing else learns: batch norm keeps weight 1 and bias 0, other biases are 0.
    """

    Settings = Settings
    paper = (
        'Ramanujan et al. 2020, "What\'s hidden in a randomly weighted neural network?", '
        "https://arxiv.org/abs/1911.13299"
    )
    aliases = ("edge-popup", "edgepopup", "popup", "hidden_networks", "supermask")

    @classmethod
    def check(cls, settings: Any, run: Any) -> None:
        super().check(settings, run)
        for section, name in (("tost", "lrsi"), ("model", "zero_init_last")):
            why = "the weights stay as mask.init draws them, and batch norm at 1: their sizes belong to the method"
            require(not getattr(getattr(run, section), name), f"{section}.{name}", True, f"{why}; give false")
        if "decay_norms" in run.given("optim"):
            raise run.not_read("optim", "decay_norms", "mask.method=edge_popup", "a method that trains batch norm")

    def prepare(self) -> None:
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                if name in self.weights:
                    parameter.copy_(self.drawn(name, parameter))
                elif parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def drawn(self, name: str, weight: Tensor) -> Tensor:
        """The weight's values, a function of (seed, name), as on all ranks."""
        size = calculate_gain("relu") / math.sqrt(self.settings.density * weight[0].numel())
        values = generator(f"edge-popup {self.recipe.seed} {name}").standard_normal(weight.shape)
        drawn = torch.from_numpy(values)
        return (drawn.sign() if self.settings.init == "signed_constant" else drawn) * size

    def reparametrization(self, phase: Phase) -> Reparametrization:
        return Popup(self.rule(), self.budget())

    def groups(self, form: Reparametrization, lr: float) -> list[ParameterGroup]:
        groups = super().groups(form, lr)
        for group in groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(group.name == PRUNABLE)
        return groups[:1]


class Popup(StraightThrough):
    """State "weight", frozen, and "score"."""

    def __init__(self, rule: UpdateRule, budget: Budget) -> None:
        super().__init__(rule, budget)
        self.rules = {"score": rule}

    def more(self, weight: Tensor, part: Slice) -> State:
        """Scores are uniform within +-1 / sqrt(fan_in): kaiming_uniform with a = sqrt(5); of (seed, index)."""
        key = noise_key(self.budget.seed, SCORES, 0)
        drawn = [uniforms(key, run.first, run.numel, weight.device) for run in part.runs]
        score = torch.cat([2 * u - 1 for u in drawn])
        for s in part.segments:
            score[s.start : s.start + s.numel] /= math.sqrt(part.layout.shapes[s.name][1:].numel())
        return {"score": score}

    def scores(self, state: State, part: Slice) -> Tensor:
        return state["score"].abs()

    def shown(self, state: State, part: Slice) -> Tensor:
        return torch.where(state["mask"], state["weight"], 0.0)

    def passing(self, state: State) -> Tensor:
        return state["weight"] * state["score"].abs()

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        return {"score": gradient.mul_(state["weight"]).mul_(state["score"].sign())}

    def counted(self, name: str, state: State) -> Tensor:
        return state[name]
