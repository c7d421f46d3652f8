"""How the kept weights are shared over the layers: one budget for the network, or the same density in each layer."""

from __future__ import annotations

from torch import Tensor

from masks.topk import kept_count, topk_masks


def kept_masks(scores: list[Tensor], density: float, constraint: str) -> list[Tensor]:
    """Boolean masks of the largest scores: round(density n) over all ("global") or in every tensor ("layerwise").

    The scores are the same on every rank, and so are the masks; ties go to the earlier tensor and position.
    """
    if constraint == "global":
        return topk_masks(scores, kept_count(density, sum(s.numel() for s in scores)))
    return [topk_masks([score], kept_count(density, score.numel()))[0] for score in scores]
