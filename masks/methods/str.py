"""str: a threshold per layer is trained with the weights, which are shrunk by it (soft thresholds)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ghostmask.engine.config import require
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.rules import Sgd, UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.sharding.spans import Spans
from ghostmask.masks.masked import Masked
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.settings import MaskSettings, number

UNSEEN = -80.0
"""sigmoid(r) is less than any weight of a network, and so is its slope, below this."""


@dataclass(frozen=True)
class Settings(MaskSettings):
    """str."""

    decided_by: ClassVar[str] = "optim.weight_decay"

    r_init: float = number(-3200.0, -1e6, 20)
    """r of every layer at the start, whose threshold is sigmoid(r). Weight decay brings r to 0. -3200 is the paper's
    for 100 epochs of ImageNet; -10 and nearer to 0 for runs of few steps."""
    r_decay: float = number(0.0, 0)
    """Weight decay of r; 0 = optim.weight_decay, as in the paper. (None at all: a tiny value, such as 1e-12.)"""


class SoftThresholds(MaskMethod):
    """STR (Kusupati et al. 2020): theta = sign(w) relu(|w| - sigmoid(r)), with one r for each layer.

    Nothing says how many weights stay: weight decay, on w and on r, does (mask.r_decay: r's alone).
    """

    Settings = Settings
    searches = True
    paper = (
        'Kusupati et al. 2020, "Soft Threshold Weight Reparameterization for Learnable Sparsity", '
        "https://arxiv.org/abs/2002.03231"
    )
    aliases = ("soft_threshold", "soft_thresholds", "threshold")

    @classmethod
    def check_steps(cls, settings: Any, run: Any, steps_per_epoch: int) -> None:
        optim, steps = run.optim, run.train.epochs * steps_per_epoch
        decay = (settings.r_decay or optim.weight_decay) * optim.lr * run.lr_scale / (1 - optim.momentum)
        end = settings.r_init * math.exp(-decay * steps)
        require(
            end > UNSEEN,
            "mask.r_init", settings.r_init, f"weight decay brings it to {end:.4g} at most in {steps} steps, where the "
            "threshold is 0: nothing would be pruned; give -10, or more mask.r_decay",
        )  # fmt: skip

    def reparametrization(self, phase: Phase) -> Reparametrization:
        optim, decay = self.recipe.optim, self.settings.r_decay
        return TrainedThresholds(
            self.rule(), Sgd(optim.momentum, decay or optim.weight_decay, optim.nesterov), self.settings.r_init
        )


class TrainedThresholds(Masked):
    """State "weight" and "r", (layers,) whole on every rank; what is pruned gets no gradient, only weight decay.

    dL/dr = -sigmoid'(r) sum over the layer of dL/dtheta sign(w), where |w| is above the threshold.
    """

    whole = ("r",)

    def __init__(self, rule: UpdateRule, rule_of_r: UpdateRule, start: float) -> None:
        super().__init__({"weight": rule, "r": rule_of_r})
        self.first = start

    def start(self, weight: Tensor, part: Slice) -> State:
        self.spans = Spans.layers(part)
        return {"weight": weight, "r": weight.new_full((self.spans.count,), self.first)}

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        w = state["weight"]
        return torch.sign(w) * torch.relu(w.abs() - self.thresholds(state))

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        kept = gradient.mul_(self.mask(state, part))
        slope = torch.sigmoid(state["r"].double())
        along = self.spans.sums(kept * torch.sign(state["weight"]))
        return {"weight": kept, "r": (-slope * (1 - slope) * along).float()}

    def thresholds(self, state: State) -> Tensor:
        """(n,) the threshold of every weight's layer."""
        return self.spans.spread(torch.sigmoid(state["r"]))

    def mask(self, state: State, part: Slice) -> Tensor:
        return state["weight"].abs() > self.thresholds(state)

    def evaluation_weights(self, state: State, part: Slice) -> Tensor:
        return self.weights(state, part, Draw(0, 0, 0))

    def counted(self, name: str, state: State) -> Tensor:
        return torch.where(state[name].abs() > self.thresholds(state), state[name], 0.0)

    def scale(self, state: State, part: Slice, factors: Mapping[str, float]) -> None:
        """f theta(w, t) = theta(f w, f t): the thresholds too, as far as a sigmoid goes."""
        super().scale(state, part, factors)
        by = state["r"].new_tensor([math.log(factors.get(name, 1.0)) for name in part.names], dtype=torch.float64)
        scaled = logsigmoid(state["r"].double()) + by
        moved = (scaled - torch.log1p(-scaled.exp())).float()
        state["r"].copy_(torch.where(by == 0, state["r"], moved.nan_to_num(20.0, 20.0)))
