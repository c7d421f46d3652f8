"""What a run says of its mask: density over all and per layer, and layers that lost everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ghostmask.engine.hooks import Hook
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.masked import PRUNABLE, Masked
from ghostmask.masks.scoring.largest import empty_layers

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer


class DensityReport(Hook):
    """Logs the exact density of the mask in the state at every report, and each layer's once per epoch."""

    shown = "mask/density"

    def kept(self, trainer: Trainer) -> tuple[Tensor, Slice]:
        """Collective: (n,) how much of each weight of this rank's slice counts as kept, in [0, 1], and the slice."""
        group, state, part = trainer.sharded.optimizer.group(PRUNABLE)
        assert isinstance(group.reparametrization, Masked)
        return group.reparametrization.mask(state, part), part

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        kept, part = self.kept(trainer)
        return {"mask/density": part.sum(kept) / part.total}

    def epoch_scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        kept, part = self.kept(trainer)
        sums = part.layer_sums(kept).tolist()
        return {f"density/{n}": k / size for n, k, size in zip(part.names, sums, part.layout.numels, strict=True)}


def mask_lines(masks: Mapping[str, Tensor], settings: Any) -> list[str]:
    """What to tell about new masks: their density and, as a warning, the layers that lost all their weights.

    settings: of the method that made them; one with `min_per_layer` can save layers.
    """
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    lines = [f"mask: density {kept / total:.6g}, {kept:,} of {total:,} weights in {len(masks)} layers"]
    advice = "; mask.min_per_layer=1 keeps some" if hasattr(settings, "min_per_layer") else ""
    if empty := empty_layers(masks):
        layers = f"{len(empty)} of {len(masks)} layers"
        lines.append(f"warning: {layers} have no weight left: {', '.join(empty)}{advice}")
    return lines
