"""What is the relaxed mask in torch operations: the form for every device, and the kernels' reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ghostmask.masks.kernels.noise import BLOCK, random_words

EPS = 1e-6
"""Nearest that a probability comes to 0 and 1 in the sampling; the projection may well put s at 0 and 1 exactly."""
CHUNK, CPU_CHUNK = 1 << 20, 1 << 14
"""Weights per step: bounds the temporary memory. On the CPU torch gives less than 2^15 numbers to one thread."""
LIMIT = 60.0
"""The odds m / (1 - m) stay within 2^-60 and 2^60: beyond, nothing can be told from 0 and 1, but products with
gradients would leave float32's normal range, where processors are a hundred times slower."""


def relaxed_mask(probability: Tensor, key: int, temperature: float, first: int) -> tuple[Tensor, Tensor]:
    """(m, 1 - m) of a vector of limited probabilities, those of weights first, first + 1, ... of the network.

    In the probabilities' type. 1 - m is computed as a sigmoid of its own: small values keep their digits.
    """
    before, numel = first % BLOCK, len(probability)
    # To whole blocks: at the end of a vector, torch's CPU code takes another sigmoid, which rounds differently.
    probability = pad(probability, (before, -(before + numel) % BLOCK), value=0.5)
    words = random_words(key, first - before, len(probability), probability.device)
    # u / (1 - u) of the uneven numbers u 2^32: neither word can be 0, and neither end loses digits.
    odds = (words | 1).to(probability.dtype) * probability
    odds = odds / (((0xFFFFFFFF - words) | 1).to(probability.dtype) * (1 - probability))
    x = (odds.log() / temperature).clamp(-LIMIT * math.log(2), LIMIT * math.log(2))
    own = slice(before, before + numel)
    return x.sigmoid()[own], (-x).sigmoid()[own]


def masked(out: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float) -> None:
    """See `masks.kernels.relaxed_mask.masked_`."""
    for start, part in _chunks(out):
        m, _ = relaxed_mask(probability[part].clamp(EPS, 1 - EPS), key, temperature, first + start)
        out[part] = weight[part] * m


def gradients(
    gradient: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float, slope: Tensor
) -> None:
    """See `masks.kernels.relaxed_mask.gradients_`."""
    for start, part in _chunks(gradient):
        s = probability[part]
        m, rest = relaxed_mask(s.clamp(EPS, 1 - EPS), key, temperature, first + start)
        kept = gradient[part].mul_(m)
        torch.mul(kept * weight[part], rest * torch.where(s <= 0, 0.0, 4 / temperature), out=slope[part])


def _chunks(vector: Tensor) -> list[tuple[int, slice]]:
    step = CPU_CHUNK if vector.device.type == "cpu" else CHUNK
    return [(start, slice(start, start + step)) for start in range(0, len(vector), step)]
