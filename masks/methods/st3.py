"""st3: soft-thresholded weights with a straight-through gradient, one threshold for all layers that rises (ST-3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ghostmask.engine.config import require
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Reparametrization, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.sharding.spans import Spans
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.method import FINETUNE
from ghostmask.masks.scoring.topk import Budget
from ghostmask.masks.settings import n_of_m, number
from ghostmask.masks.straight_through import CutEveryStep, Thresholded, Thresholding


@dataclass(frozen=True)
class Settings(Thresholding):
    """st3."""

    start_fraction: float = number(0.05, 0, 1)
    """Where the density begins to fall, as a fraction of train.epochs."""
    end_fraction: float = number(0.5, 0, 1)
    """Where the density reaches its target, as a fraction of train.epochs."""
    sigma: bool = False
    """true = ST-3-sigma: |w| counts in units of its layer's width scale, (sum of the weight's shape)^-1/2, so that wide
    layers keep more and the network needs fewer FLOPs."""
    rescale: bool = True
    """Whether each output channel is multiplied by c_out, which makes up for what the threshold takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.sigma or n_of_m(self.granularity) is None,
            "mask.sigma", self.sigma, f"is not read with mask.granularity={self.granularity}: a block is of one layer; "
            "leave it out",
        )  # fmt: skip


class St3(CutEveryStep):
    """ST-3 (Vanderschueren and De Vleeschouwer 2023): theta = c_out sign(w) (|w| - t) m, dL/dw = dL/dtheta for all w.

    m = the largest |w| of all layers, exactly round(density n), at a density that falls as a cubic in every step; t =
    the largest |w| that is pruned (the authors interpolate the quantile between that and the smallest that is kept).
    With N:M the N largest of each block, and t is the block's: S-STE's pruning function (Hu et al. 2024,
    https://arxiv.org/abs/2409.09099; whose scale is one per tensor, and stays, where c_out follows the mask).
    Then the phase "finetune": theta as plain weights, under the mask of the end.
    """

    Settings = Settings
    paper = (
        'Vanderschueren & De Vleeschouwer 2023, "Are straight-through gradients and soft-thresholding all you need for '
        'sparse training?", https://arxiv.org/abs/2212.01076'
    )
    aliases = ("st-3", "st3_sigma mask.sigma=true", "soft_threshold")
    finetunes = True

    def phases(self) -> tuple[tuple[str, int], ...]:
        return (*super().phases(), (FINETUNE, self.recipe.finetune.epochs))

    def reparametrization(self, phase: Phase) -> Reparametrization:
        if phase.name == FINETUNE:
            return FixedMask(self.rule(), self.found or None, self.counts())
        s = self.settings
        return SoftThreshold(self.rule(), self.budget(), *self.window(phase), s.sigma, s.rescale)


class SoftThreshold(Thresholded):
    """State "rescale", (output channels of all layers,): c_out. The threshold is in units of the scores."""

    whole: ClassVar[tuple[str, ...]] = ("threshold", "rescale")

    def __init__(
        self, rule: UpdateRule, budget: Budget, first: int, last: int, sigma: bool = False, rescale: bool = True
    ) -> None:
        super().__init__(rule, budget, first, last)
        self.sigma, self.rescale = sigma, rescale

    def more(self, weight: Tensor, part: Slice) -> State:
        shapes = torch.tensor([[shape[0], shape[1:].numel()] for shape in part.layout.shapes.values()])
        self._lengths = shapes[:, 1].repeat_interleave(shapes[:, 0]).to(weight.device)
        return super().more(weight, part) | {"rescale": weight.new_ones(len(self._lengths))}

    def scores(self, state: State, part: Slice) -> Tensor:
        magnitude = state["weight"].abs()
        return Spans.layers(part).multiply_(magnitude, self._widths(part, 0.5)) if self.sigma else magnitude

    def thresholds(self, state: State, part: Slice) -> Tensor:
        t = super().thresholds(state, part)
        return Spans.layers(part).spread(self._widths(part, -0.5) * t) if self.sigma else t

    def above(self, magnitude: Tensor, threshold: Tensor) -> Tensor:
        return magnitude.sub_(threshold).clamp_(min=0)

    def shown(self, state: State, part: Slice) -> Tensor:
        theta = super().shown(state, part).detach()
        return Spans.channels(part).multiply_(theta, state["rescale"]) if self.rescale else theta

    def cut(self, state: State, part: Slice) -> Tensor:
        scores = super().cut(state, part)
        state["rescale"].copy_(self._c_out(state, part))
        return scores

    def _c_out(self, state: State, part: Slice) -> Tensor:
        """1.01 / (q + 0.01), q = (mean |w| m + 1e-6) / (mean |w| + 1e-6) over each output channel; collective."""
        channels, magnitude = Spans.channels(part), state["weight"].abs()
        if self.density == 1 or not self.rescale:
            return magnitude.new_ones(channels.count)
        kept, whole = channels.sums(magnitude * state["mask"]), channels.sums(magnitude)
        least = 1e-6 * self._lengths
        return (1.01 / ((kept + least) / (whole + least) + 0.01)).float()

    def _widths(self, part: Slice, power: float) -> Tensor:
        """(layers,) the sum of each layer's shape, to a power."""
        sizes = torch.tensor([float(sum(shape)) for shape in part.layout.shapes.values()])
        return sizes.to(part.world.device, non_blocking=True) ** power
