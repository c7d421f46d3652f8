"""SGD in which a parameter's decay or rate depends on the whole parameter: no decay of norms and biases, LARS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.config import OptimConfig
from ghostmask.engine.sharding.rules import Scale, Sgd
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.sharding.spans import Spans


def sgd_of(optim: OptimConfig) -> Sgd:
    """The rule of a run's weights."""
    common = (optim.momentum, optim.weight_decay, optim.nesterov)
    if optim.decay_norms and not optim.lars:
        return Sgd(*common)
    return LayerwiseSgd(*common, optim.decay_norms, optim.lars_trust if optim.lars else 0.0)


@dataclass(frozen=True)
class LayerwiseSgd(Sgd):
    """SGD on g' = r (g + d w), with d and r of each parameter by itself.

    d = weight_decay, or 0 for parameters of one dimension unless decay_vectors; r = 1, or with trust > 0, for those
    of two or more dimensions, LARS's trust |w| / (|g| + d |w|) (You et al. 2017, eq. 6), 1 where a norm is 0. |w|: of
    the weights that the mask leaves. Momentum is torch's: b <- momentum b + g', w <- w - lr b.
    """

    decay_vectors: bool = True
    trust: float = 0.0

    def adapt(self, value: Tensor, gradient: Tensor, counted: Callable[[], Tensor], part: Slice, scale: Scale) -> Scale:
        # One operation at a time: fused ones round the ends of a vector otherwise, and slices end anywhere.
        gradient.div_(scale.divisor)
        ratios = self._ratios(counted(), gradient, part) if self.trust else None
        for s in part.segments:
            own, matrix = slice(s.start, s.start + s.numel), len(part.layout.shapes[s.name]) > 1
            if matrix or self.decay_vectors:
                gradient[own] += value[own] * self.weight_decay
            if matrix and ratios is not None:
                gradient[own] *= ratios[s.layer]
        return Scale(torch.ones_like(scale.divisor), scale.skip)

    def _ratios(self, weights: Tensor, gradient: Tensor, part: Slice) -> Tensor:
        """(layers,) float32."""
        w, g = exact_norms(part, [weights, gradient]).unbind()
        ratios = self.trust * w / (g + self.weight_decay * w)
        return torch.where((w > 0) & (g > 0), ratios, 1.0).float()

    def _decay(self) -> float:
        return 0.0  # it is in the gradient already


def exact_norms(part: Slice, tensors: list[Tensor]) -> Tensor:
    """Collective: (len(tensors), layers) float64, the norm of each parameter's elements on all ranks, the same bits
    however the slices are cut; 0 for a parameter with values that are not finite."""
    layers = Spans.layers(part)
    return torch.stack([layers.sums(tensor, squared=True) for tensor in tensors]).sqrt().nan_to_num(0.0)
