"""The masked weights w m that ProbMask trains through, and what their gradient means for w and s (eq. 3-5).

    m = sigmoid((log s - log(1 - s) + L) / tau),    L = log u - log(1 - u) ~ Logistic(0, 1),    u = u(key, i)

is the paper's mask with one uniform number in place of its two Gumbel ones: their difference is Logistic(0, 1). Both
functions work on one flat slice of the network's weights; i is a weight's index in the whole network, so that the noise
depends neither on the slices nor on the ranks. Nothing is kept between the two: the noise is drawn a second time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.masks.kernels import relaxed_mask_torch
from ghostmask.masks.kernels.compiled import kernels_for

EPS = 1e-6
"""Nearest that a probability comes to 0 and 1 in the sampling; the projection may well put s at 0 and 1 exactly."""
MODULE = "ghostmask.masks.kernels.relaxed_mask"


@dataclass(frozen=True)
class Limits:
    """What becomes of dm/ds = m (1 - m) / (tau p (1 - p)) near 0 and 1, where it has a heavy tail.

    floor: p (1 - p) in the denominator is at least that much; at_zero, at_one: factors of the gradient where s <= 0 and
    where s >= 1.
    """

    floor: float = 0.0
    at_zero: float = 1.0
    at_one: float = 1.0


def masked_(out: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float) -> None:
    """out = w m.

    out: (n,) float32 or bfloat16; weight, probability: (n,) float32; all contiguous. first: index in the network of
    their first element. key: of `NoiseKey.value`; temperature: tau > 0. s is limited to [EPS, 1 - EPS] here; where it
    is nan, so is the result.
    """
    _check(out, weight, probability)
    if len(out):
        form = kernels_for(weight, MODULE) or relaxed_mask_torch
        form.masked(out, weight, probability, first, key, temperature, EPS)


def gradients_(
    gradient: Tensor,
    weight: Tensor,
    probability: Tensor,
    first: int,
    key: int,
    temperature: float,
    grad_weight: Tensor,
    grad_probability: Tensor,
    limits: Limits,
) -> None:
    """grad_weight = g m and grad_probability = g w m (1 - m) / (tau max(p (1 - p), floor)), p = s limited as above.

    gradient: dL/d(w m), (n,) float32 or bfloat16; the others as in `masked_`; grad_weight may be the gradient itself.
    The gradient passes straight through the limits of p, but for the factors that `limits` has at 0 and at 1.
    """
    _check(gradient, weight, probability, grad_weight, grad_probability)
    if len(gradient):
        form = kernels_for(weight, MODULE) or relaxed_mask_torch
        form.gradients(
            gradient, weight, probability, first, key, temperature, grad_weight, grad_probability, limits, EPS
        )  # fmt: skip


def _check(wide_or_bfloat16: Tensor, *wide: Tensor) -> None:
    tensors = (wide_or_bfloat16, *wide)
    types = {t.dtype for t in wide} | {wide_or_bfloat16.dtype} - {torch.bfloat16}
    if types != {torch.float32} or not all(t.is_contiguous() and t.shape == (len(t),) for t in tensors):
        raise ValueError(f"{[(t.dtype, tuple(t.shape), t.stride()) for t in tensors]}: give contiguous float32 vectors")
    if len({len(t) for t in tensors}) > 1:
        raise ValueError(f"lengths {[len(t) for t in tensors]}: give vectors of one length")
