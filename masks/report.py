"""What a run says of its mask: density, layers that lost everything, and in a search its probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ghostmask.engine.hooks import Hook
from ghostmask.engine.metrics import Counts
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.masked import PRUNABLE, Masked
from ghostmask.masks.relaxed import RelaxedMask
from ghostmask.masks.schedules import DECIDING
from ghostmask.masks.scoring.topk import empty_layers

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer

DECIDED = 0.01
"""A probability this near to 0 or 1 counts as decided."""
FEW_DECIDED = 0.8
"""A search that ends with a smaller share of decided probabilities gets a warning."""
BUCKETS = 64


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


class ProbabilityReport(DensityReport):
    """Collective: numbers and histograms of the probabilities in the state of all ranks; the density is their mean."""

    def __init__(self, form: RelaxedMask) -> None:
        self.form = form

    def kept(self, trainer: Trainer) -> tuple[Tensor, Slice]:
        _, state, part = trainer.sharded.optimizer.group(PRUNABLE)
        return state["probability"], part

    def on_step_start(self, trainer: Trainer) -> None:
        following = trainer.position.step + 1
        last_of_epoch = following % trainer.position.steps_per_epoch == 0
        self.form.watching = following % trainer.config.log_every == 0 or last_of_epoch

    def on_epoch_end(self, trainer: Trainer) -> None:
        if trainer.position.step != trainer.phase.end_step:
            return
        decided = float(self._decided(trainer))
        if decided < FEW_DECIDED:
            lr = trainer.task.groups[0].lr * self.form.rates["probability"]
            steps = trainer.phase.end_step - trainer.phase.first_step
            trainer.reporter.progress.message(
                f"warning: only {decided:.0%} of the probabilities are within {DECIDED:g} of 0 or 1 after {steps} "
                f"steps; mask.lr = {lr:g} is too small for so few: try mask.lr={suggested_rate(lr, steps):.2g}"
            )

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        values: dict[str, float | Tensor] = {
            **super().scalars(trainer),
            "mask/temperature": self.form.temperature,
            "mask/density_target": self.form.density,
            "mask/decided_fraction": self._decided(trainer),
            "mask/threshold": self.form.threshold,
        }
        if self.form.limit_share is not None:
            values["gradient/prunable.probability_limit_share"] = self.form.limit_share
        return values

    def histograms(self, trainer: Trainer) -> Mapping[str, Tensor | Counts]:
        return {f"probability/{name}": counts for name, counts in layer_histograms(*self.kept(trainer)).items()}

    def _decided(self, trainer: Trainer) -> Tensor:
        s, part = self.kept(trainer)
        return part.sum((s < DECIDED) | (s > 1 - DECIDED)) / part.total


def suggested_rate(lr: float, steps: int) -> float:
    """A rate with which `steps` steps decide (see schedules.probability_rate), and a higher one than lr."""
    return max(lr * 2, DECIDING / max(steps, 1))


def layer_histograms(values: Tensor, part: Slice) -> dict[str, Counts]:
    """Collective: of each layer, how its values in [0, 1] on all ranks are spread over BUCKETS equal buckets."""
    counts = torch.zeros(len(part.names), BUCKETS, dtype=torch.int64, device=values.device)
    for s in part.segments:
        own = values[s.start : s.start + s.numel]
        counts[s.layer] += torch.bincount((own * BUCKETS).long().clamp_(0, BUCKETS - 1), minlength=BUCKETS)
    counts = part.world.all_reduce(counts)
    sums, squares = part.layer_sums(values), part.layer_sums(values.square())
    limits = [(i + 1) / BUCKETS for i in range(BUCKETS)]
    return {
        name: Counts(limits, counts[i].tolist(), float(sums[i]), float(squares[i])) for i, name in enumerate(part.names)
    }


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
