"""feather: a threshold between soft and hard for all layers, which rises; the gradient goes to all weights, scaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.scoring.topk import Budget
from ghostmask.masks.settings import number
from ghostmask.masks.straight_through import CutEveryStep, Thresholded, Thresholding

VERY_SPARSE = 0.05
"""Below this density the paper halves the gradient of pruned weights."""


@dataclass(frozen=True)
class Settings(Thresholding):
    """feather."""

    start_fraction: float = number(0.0, 0, 1)
    """Where the density begins to fall, as a fraction of train.epochs."""
    end_fraction: float = number(0.5, 0, 1)
    """Where the density reaches its target, as a fraction of train.epochs."""
    theta: float = number(0.0, 0, 1)
    """What the gradient of pruned weights is multiplied by; 0 = as in the paper, 0.5 below density 0.05, else 1.
    (No gradient at all: a tiny value, such as 1e-9.)"""


class Feather(CutEveryStep):
    """Feather with a global threshold (Glentis Georgoulakis et al. 2023): theta = sign(w) (|w|^3 - t^3)^(1/3) m.

    m = the largest |w| of all layers, exactly round(density n), at a density that falls as a cubic in every step; t =
    the largest |w| that is pruned. With N:M the N largest of each block, and t is the block's. dL/dw = dL/dtheta where
    m, mask.theta times that elsewhere. What is trained is what is delivered (the authors' code delivers w m in the end,
    under the batch-norm statistics of theta).
    """

    Settings = Settings
    paper = (
        'Glentis Georgoulakis et al. 2023, "Feather: an elegant solution to effective DNN sparsification", '
        "https://arxiv.org/abs/2310.02448"
    )
    aliases = ("feather_global",)

    def reparametrization(self, phase: Phase) -> Reparametrization:
        s = self.settings
        slope = s.theta or (0.5 if s.density < VERY_SPARSE else 1.0)
        return CubicThreshold(self.rule(), self.budget(), *self.window(phase), slope)


class CubicThreshold(Thresholded):
    """theta = sign(w) (|w|^3 - t^3)^(1/3) m."""

    def __init__(self, rule: UpdateRule, budget: Budget, first: int, last: int, slope: float) -> None:
        super().__init__(rule, budget, first, last)
        self.slope = slope

    def above(self, magnitude: Tensor, threshold: Tensor) -> Tensor:
        # |w|^3 - t^3 as a product: a difference of cubes would lose its digits near t.
        square = magnitude * magnitude + magnitude * threshold + threshold * threshold
        root = cube_root((magnitude - threshold).clamp_(min=0).mul_(square))
        return torch.where(threshold > 0, root, magnitude)

    def passing(self, state: State) -> Tensor:
        return state["weight"] * torch.where(state["mask"], 1.0, self.slope)

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        return {"weight": gradient.mul_(torch.where(state["mask"], 1.0, self.slope))}


def cube_root(x: Tensor) -> Tensor:
    """x^(1/3) of x >= 0, of float32 above 1e-37, by Newton's method: +, * and / round alike wherever a slice is cut,
    which pow does not."""
    integer, third = (torch.int32, 0x2A512400) if x.dtype == torch.float32 else (torch.int64, 0x2A9F7893782DA1CE)
    y = (torch.div(x.view(integer), 3, rounding_mode="floor") + third).view(x.dtype)  # within 4 %
    for _ in range(3 if x.dtype == torch.float32 else 5):
        y = (x / (y * y) + 2 * y) / 3
    return torch.where(x > 0, y, 0.0)
