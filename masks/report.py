"""What a run says of its mask: density over all and per layer, and layers that lost everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ghostmask.engine.hooks import Hook
from ghostmask.masks.masked import masked_group
from ghostmask.masks.scoring.largest import empty_layers

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer


class DensityReport(Hook):
    """Logs the exact density of the mask in the state at every report, and each layer's once per epoch."""

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        found = masked_group(trainer.sharded.optimizer)
        if found is None:
            return {}
        form, state, part = found
        return {"mask/density": part.sum(form.mask(state, part)) / part.total}

    def epoch_scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        found = masked_group(trainer.sharded.optimizer)
        if found is None:
            return {}
        form, state, part = found
        kept = part.layer_sums(form.mask(state, part)).tolist()
        return {f"density/{n}": k / size for n, k, size in zip(part.names, kept, part.layout.numels, strict=True)}


def mask_lines(masks: Mapping[str, Tensor], settings: Any) -> list[str]:
    """What to tell about new masks: their density and, as a warning, the layers that lost all their weights.

    settings: of the method that made them; one with `min_per_layer` can save layers.
    """
    if not masks:
        return []
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    lines = [f"mask: density {kept / total:.6g}, {kept:,} of {total:,} weights in {len(masks)} layers"]
    empty = empty_layers(masks)
    if empty:
        named = f"{len(empty)} of {len(masks)} layers have no weight left: {', '.join(empty)}"
        lines.append(
            f"warning: {named}" + ("; mask.min_per_layer=1 keeps some" if hasattr(settings, "min_per_layer") else "")
        )
    return lines
