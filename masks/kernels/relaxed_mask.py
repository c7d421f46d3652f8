"""The masked weights w m that ProbMask trains through, and what their gradient means for w and s (eq. 3-5).

    m = sigmoid((log s - log(1 - s) + L) / tau),    L = log u - log(1 - u) ~ Logistic(0, 1),    u = u(key, i)

is the paper's mask with one uniform number in place of its two Gumbel ones: their difference is Logistic(0, 1). Both
functions work on one flat slice of the network's weights; i is a weight's index in the whole network, so that the noise
depends neither on the slices nor on the ranks. Nothing is kept between the two: the noise is drawn a second time.

CUDA: Triton; CPU: numba; elsewhere, and as the kernels' reference, torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ghostmask.engine.compiled import kernels_on
from ghostmask.masks.kernels.noise import BLOCK, random_words

EPS = 1e-6
"""Nearest that a probability comes to 0 and 1 in the sampling; the projection may well put s at 0 and 1 exactly."""
CHUNK, CPU_CHUNK = 1 << 20, 1 << 14
"""Weights per step: bounds the temporary memory. On the CPU torch gives less than 2^15 numbers to one thread."""
LIMIT = 60.0
"""The odds m / (1 - m) stay within 2^-60 and 2^60: beyond, nothing can be told from 0 and 1, but products with
gradients would leave float32's normal range, where processors are a hundred times slower."""


def masked_(out: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float) -> None:
    """out = w m.

    out: (n,) float32 or bfloat16; weight, probability: (n,) float32; all contiguous. first: index in the network of
    their first element. key: of `noise_key`; temperature: tau > 0. s is limited to [EPS, 1 - EPS] here; where it
    is nan, so is the result.
    """
    _check(weight, probability, out, narrow=out)
    kernels = kernels_on(weight.device, __name__) if len(out) else None
    if kernels:
        kernels.masked(out, weight, probability, first, key, temperature)
        return
    for start, part in _chunks(out):
        m, _ = relaxed_mask(probability[part].clamp(EPS, 1 - EPS), key, temperature, first + start)
        out[part] = weight[part] * m


def gradients_(
    gradient: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float, slope: Tensor
) -> None:
    """In place: of g = dL/d(w m) in `gradient` becomes dL/dw = g m, and slope = dL/ds = 4 g w m (1 - m) / tau.

    All (n,) float32, contiguous; the rest as in `masked_`. The equations have s (1 - s) in the place of 1 / 4, which
    gives dL/ds a heavy tail near 0 and 1 (docs/decisions.md, D54). Where s <= 0 it is 0.
    """
    _check(gradient, weight, probability, slope)
    kernels = kernels_on(weight.device, __name__) if len(gradient) else None
    if kernels:
        kernels.gradients(gradient, weight, probability, first, key, temperature, slope)
        return
    for start, part in _chunks(gradient):
        s = probability[part]
        m, rest = relaxed_mask(s.clamp(EPS, 1 - EPS), key, temperature, first + start)
        kept = gradient[part].mul_(m)
        torch.mul(kept * weight[part], rest * torch.where(s <= 0, 0.0, 4 / temperature), out=slope[part])


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


def try_out(masked: Callable[..., None], gradients: Callable[..., None], device: torch.device) -> None:
    """Raise RuntimeError unless compiled forms of the two give 1500 weights the noise that they should have."""
    w, s, g = (torch.full((1500,), value, device=device) for value in (2.0, 0.5, 2.0))
    gradients(g, w, s, 700, 1 << 63, 1.0, torch.empty_like(g))
    # At s = 1/2 and tau = 1 the mask is u itself.
    expected = 2 * ((random_words(1 << 63, 700, 1500, device) | 1).float() / 2**32)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)):
        out = torch.empty(1500, dtype=dtype, device=device)
        masked(out, w, s, 700, 1 << 63, 1.0)
        if not torch.allclose(out.float(), expected, rtol=allowed) or not torch.allclose(g, expected, rtol=1e-5):
            raise RuntimeError("the compiled relaxed mask gives wrong numbers here")


def _check(*vectors: Tensor, narrow: Tensor | None = None) -> None:
    """narrow: the one that may be bfloat16."""
    types = {v.dtype for v in vectors if v is not narrow or v.dtype != torch.bfloat16}
    if types != {torch.float32} or any(v.shape != (len(v),) or not v.is_contiguous() for v in vectors):
        raise ValueError(f"{[(v.dtype, tuple(v.shape), v.stride()) for v in vectors]}: give contiguous float32 vectors")
    if len({len(v) for v in vectors}) > 1:
        raise ValueError(f"lengths {[len(v) for v in vectors]}: give vectors of one length")


def _chunks(vector: Tensor) -> list[tuple[int, slice]]:
    step = CPU_CHUNK if vector.device.type == "cpu" else CHUNK
    return [(start, slice(start, start + step)) for start in range(0, len(vector), step)]
