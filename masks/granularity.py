"""In what units does a method prune, and what do they cost? mask.granularity and mask.budget, made of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ghostmask.masks.scoring.topk import Budget, Units
from ghostmask.masks.settings import n_of_m
from ghostmask.masks.units.blocks import Blocks, Kernels
from ghostmask.masks.units.channels import Channels
from ghostmask.masks.units.coupling import coupling

Uses = Callable[[], Mapping[str, int]]
"""By weight name, how often an image uses every weight of a layer."""


def units_of(
    settings: Any, net: nn.Module, weights: Mapping[str, Tensor], image_shape: tuple[int, int, int] | None, uses: Uses
) -> Units | None:
    """The units in which a method with these settings prunes `weights` of the mask-free `net`; None: every weight by
    itself, each counted once.

    image_shape: (channels, height, width) of what the network sees; only channels ask for it. Raises InputError for a
    network whose channels cannot be removed.
    """
    granularity, flops = getattr(settings, "granularity", "weight"), getattr(settings, "budget", "weights") == "flops"
    if block := n_of_m(granularity):
        return Blocks(*block)
    if granularity == "weight" and not flops:
        return None
    counted = uses() if flops else None
    if granularity != "channel":
        lengths = {n: w.shape[2:].numel() if granularity == "kernel" else 1 for n, w in weights.items()}
        return Kernels(lengths, counted)
    assert image_shape is not None
    units = Channels(coupling(net, weights, image_shape), {n: w.shape for n, w in weights.items()}, counted)
    units.check(Budget(settings.density, settings.constraint, getattr(settings, "min_per_layer", 0)))
    return units
