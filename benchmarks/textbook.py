"""The formulations everything is compared with: eager, vectorised PyTorch, as the paper's equations read."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6
PROBES = 21
"""Halvings of the authors' code."""


def masked_weights(weights: list[Tensor], probabilities: list[Tensor], temperature: float) -> list[Tensor]:
    """[w m], m = sigmoid((log s - log(1 - s) + g1 - g0) / tau), g0 and g1 ~ Gumbel(0, 1): eq. 3-5, tensor by tensor."""
    masked = []
    for w, probability in zip(weights, probabilities, strict=True):
        s = probability.clamp(EPS, 1 - EPS)
        g0, g1 = gumbel(s), gumbel(s)
        m = torch.sigmoid((torch.log(s) - torch.log(1 - s) + g1 - g0) / temperature)
        masked.append(w * m)
    return masked


def gumbel(like: Tensor) -> Tensor:
    """Gumbel(0, 1) numbers: -log(-log u), u uniform in (0, 1)."""
    u = torch.rand_like(like).clamp_(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(u))


def project(z: Tensor, budget: float) -> Tensor:
    """proj_C(z) = clamp(z - v, 0, 1) of one flat tensor, v = max(0, v1) by bisection: theorem 1, eq. 6."""
    if z.clamp(0, 1).sum().item() <= budget:
        return z.clamp(0, 1)
    low, high = 0.0, z.max().item()
    for _ in range(PROBES):
        middle = (low + high) / 2
        if (z - middle).clamp(0, 1).sum().item() > budget:
            low = middle
        else:
            high = middle
    return (z - (low + high) / 2).clamp(0, 1)
