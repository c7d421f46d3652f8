"""SGD in which a parameter's decay or rate depends on the whole parameter: no decay of norms and biases, LARS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.engine.config import OptimConfig
from ghostmask.engine.sharding.rules import Scale, Sgd
from ghostmask.engine.sharding.slices import Slice

CHUNK = 1 << 18
"""Elements that are in float64 at a time."""
BITS = 2.0**34
"""Integers per largest square: 2^29 elements of a parameter can be added up."""


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
    """Collective: (len(tensors), layers) float64, the norm of each parameter's elements on all ranks.

    The same bits however the slices are cut: squares, in shares of the parameter's largest, are rounded to 34 bits and
    added up as integers. 0 for a parameter with values that are not finite.
    """
    layers, device = len(part.layout.shapes), part.world.device
    largest = torch.zeros(len(tensors), layers, dtype=torch.float64, device=device)
    for row, tensor in zip(largest, tensors, strict=True):
        for s in part.segments:
            row[s.layer] = tensor[s.start : s.start + s.numel].abs().max()
    largest = part.world.all_reduce(largest, dist.ReduceOp.MAX)
    sums = torch.zeros(len(tensors), layers, dtype=torch.int64, device=device)
    for row, most, tensor in zip(sums, largest, tensors, strict=True):
        for s in part.segments:
            for piece in torch.split(tensor[s.start : s.start + s.numel], CHUNK):
                squares = (piece.double() / most[s.layer]).square() * BITS  # nan where the largest is 0
                row[s.layer] += squares.round().nan_to_num(0.0, 0.0, 0.0).long().sum()
    return largest.nan_to_num(0.0, 0.0, 0.0) * (part.world.all_reduce(sums).double() / BITS).sqrt()
