"""How are scores of several weights together compared between layers?

In shares of their layer's mean. The mean of a channel's or a kernel's |w| hardly differs inside a layer, as single
weights do, but much between layers, by their width: without this the last layers lose everything at once (digits,
channels at density 0.3: 10 % accuracy). Torch-Pruning's importances do the same (normalizer "mean").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.sharding.spans import Spans


def layer_shares(part: Slice, scores: Tensor, among: Tensor | None) -> Tensor:
    """Collective: (n,) in the type of the scores: each divided by the mean |score| of its layer; 0 where that is.

    among: the ones that count, 0 elsewhere. Raises RunStopped where a score is not finite.
    """
    layers = Spans.layers(part)
    ones = torch.ones_like(scores) if among is None else among.to(scores.dtype)
    scores = scores if among is None else torch.where(among, scores, 0.0)
    sums, numbers = layers.sums(scores.abs()), layers.sums(ones)
    if not bool(sums.isfinite().all()):
        names = [name for name, fine in zip(part.names, sums.isfinite().tolist(), strict=True) if not fine]
        raise RunStopped(f"scores are not finite in {', '.join(names[:5])}", EXIT_NON_FINITE)
    scales = torch.where(sums > 0, numbers / sums, 0.0)
    return (scores.double() * layers.spread(scales)).to(scores.dtype)
