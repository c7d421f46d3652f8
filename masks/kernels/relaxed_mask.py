"""The masked weights w m that ProbMask trains through, and what their gradient means for w and s (eq. 3-5).

    m = sigmoid((log s - log(1 - s) + L) / tau),    L = log u - log(1 - u) ~ Logistic(0, 1),    u = u(key, i)

is the paper's mask with one uniform number in place of its two Gumbel ones: their difference is Logistic(0, 1). Both
functions work on one flat slice of the network's weights; i is a weight's index in the whole network, so that the noise
depends neither on the slices nor on the ranks. Nothing is kept between the two: the noise is drawn a second time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostmask.engine.compiled import kernels_on
from ghostmask.masks.kernels import relaxed_mask_torch

MODULE = "ghostmask.masks.kernels.relaxed_mask"


def masked_(out: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float) -> None:
    """out = w m.

    out: (n,) float32 or bfloat16; weight, probability: (n,) float32; all contiguous. first: index in the network of
    their first element. key: of `noise_key`; temperature: tau > 0. s is limited to [EPS, 1 - EPS] here; where it
    is nan, so is the result.
    """
    _check(weight, probability, out, narrow=out)
    if len(out):
        form = kernels_on(weight.device, MODULE) or relaxed_mask_torch
        form.masked(out, weight, probability, first, key, temperature)


def gradients_(
    gradient: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float, slope: Tensor
) -> None:
    """In place: of g = dL/d(w m) in `gradient` becomes dL/dw = g m, and slope = dL/ds = 4 g w m (1 - m) / tau.

    All (n,) float32, contiguous; the rest as in `masked_`. The equations have s (1 - s) in the place of 1 / 4, which
    gives dL/ds a heavy tail near 0 and 1 (docs/decisions.md, D54). Where s <= 0 it is 0.
    """
    _check(gradient, weight, probability, slope)
    if len(gradient):
        form = kernels_on(weight.device, MODULE) or relaxed_mask_torch
        form.gradients(gradient, weight, probability, first, key, temperature, slope)


def _check(*vectors: Tensor, narrow: Tensor | None = None) -> None:
    """narrow: the one that may be bfloat16."""
    types = {v.dtype for v in vectors if v is not narrow or v.dtype != torch.bfloat16}
    if types != {torch.float32} or any(v.shape != (len(v),) or not v.is_contiguous() for v in vectors):
        raise ValueError(f"{[(v.dtype, tuple(v.shape), v.stride()) for v in vectors]}: give contiguous float32 vectors")
    if len({len(v) for v in vectors}) > 1:
        raise ValueError(f"lengths {[len(v) for v in vectors]}: give vectors of one length")
