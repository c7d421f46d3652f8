"""ProbMask's mask and projection written out in float64: what the optimizer is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from ghostmask.engine.sharding.reparametrization import Draw
from ghostmask.masks.kernels.noise import noise_key, random_words
from ghostmask.masks.kernels.relaxed_mask import EPS


def relaxed_mask(probability: Tensor, first: int, draw: Draw, temperature: float) -> Tensor:
    """m = sigmoid((log s - log(1 - s) + log u - log(1 - u)) / tau) of a float64 vector, limited to [EPS, 1 - EPS].

    first: index in the network of its first element. Autograd's gradient goes straight through the limits.
    """
    words = random_words(noise_key(draw.seed, draw.step, draw.sample), first, len(probability), "cpu")
    p = probability + (_inside(probability) - probability).detach()
    logistic = ((words | 1).double() / ((0xFFFFFFFF - words) | 1).double()).log()
    return ((p.log() - (1 - p).log() + logistic) / temperature).sigmoid()


def bounded(slope: Tensor, probability: Tensor) -> Tensor:
    """Autograd's dL/ds with 1 / 4 in the place of the s (1 - s) in its denominator, and 0 where s is (D54)."""
    p = _inside(probability)
    return torch.where(probability <= 0, 0.0, slope * 4 * p * (1 - p))


def projected(z: Tensor, budget: float) -> Tensor:
    """The nearest point of {sum(s) <= budget, 0 <= s <= 1} to a float64 vector, by bisection (theorem 1)."""
    low, high = 0.0, max(0.0, float(z.max()))
    if float(z.clamp(0, 1).sum()) <= budget:
        return z.clamp(0, 1)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((z - middle).clamp(0, 1).sum()) > budget else (low, middle)
    return (z - high).clamp(0, 1)


def _inside(probability: Tensor) -> Tensor:
    # The limits are float32 numbers: 1 - p at the upper one is 1.3 % more than EPS.
    low, high = torch.tensor([EPS, 1 - EPS]).tolist()
    return probability.clamp(low, high)
