"""What a run says of its mask: density, layers that lost everything, and in a search its probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ghostmask.engine.hooks import Hook
from ghostmask.engine.metrics import Counts
from ghostmask.engine.sharding.average import delivered
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.checking import MaskWatch
from ghostmask.masks.masked import PRUNABLE, Masked
from ghostmask.masks.relaxed import RelaxedMask
from ghostmask.masks.schedules import DECIDED

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer

BUCKETS = 64


class DensityReport(Hook):
    """Collective: checks the mask in the state after every decision (see `checking`), logs its exact density at every
    report and each layer's once per epoch.

    watch: of the run; last: what the mask must keep at the end of the phase, where the form itself does not say.
    """

    shown = "mask/density"

    def __init__(self, watch: MaskWatch, last: Sequence[int] | None = None) -> None:
        self.watch, self.last = watch, last
        self._started = False  # `ghostmask doctor` makes steps under masks that nobody has found

    def on_start(self, trainer: Trainer) -> None:
        self._started = True
        if not self._form(trainer).costly:
            self.kept(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        if self._form(trainer).decides(trainer.num_updates):
            self.kept(trainer)

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        return {} if self._form(trainer).costly else {"mask/density": self._density(trainer)}

    def epoch_scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        kept, part = self.kept(trainer), trainer.sharded.optimizer.group(PRUNABLE)[2]
        return {f"density/{n}": k / size for n, k, size in zip(part.names, kept, part.layout.numels, strict=True)}

    def kept(self, trainer: Trainer) -> list[int]:
        """Collective: the weights that the present mask keeps of each layer. Raises RuntimeError (see `checking`)."""
        _, state, part = trainer.sharded.optimizer.group(PRUNABLE)
        form = self._form(trainer)
        due = form.due(part) if self._started else None
        if due is None and trainer.position.step == trainer.phase.end_step:
            due = self.last
        with torch.no_grad():
            mask = form.mask(delivered(state), part)
            return self.watch.check(part, mask, due, trainer.reporter.progress.message)

    def _density(self, trainer: Trainer) -> float:
        kept = self.kept(trainer)
        return sum(kept) / trainer.sharded.optimizer.group(PRUNABLE)[2].total

    def _form(self, trainer: Trainer) -> Masked:
        form = trainer.sharded.optimizer.group(PRUNABLE)[0].reparametrization
        assert isinstance(form, Masked)
        return form


class ProbabilityReport(Hook):
    """Collective: numbers and histograms of the probabilities in the state of all ranks; the density is their mean.

    After `DensityReport`, whose densities, of the mask that would be delivered, it replaces.
    """

    shown = "mask/density"

    def __init__(self, form: RelaxedMask) -> None:
        self.form = form

    def kept(self, trainer: Trainer) -> tuple[Tensor, Slice]:
        """(n,) the probabilities of this rank's slice, and the slice."""
        _, state, part = trainer.sharded.optimizer.group(PRUNABLE)
        return self.form.spread(state, part), part

    def on_step_start(self, trainer: Trainer) -> None:
        following = trainer.position.step + 1
        last_of_epoch = following % trainer.position.steps_per_epoch == 0
        self.form.watching = following % trainer.config.log_every == 0 or last_of_epoch

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        s, part = self.kept(trainer)
        values: dict[str, float | Tensor] = {
            "mask/density": part.sum(s) / part.total,
            "mask/temperature": self.form.temperature,
            "mask/density_target": self.form.density,
            "mask/decided_fraction": self._decided(trainer),
            "mask/threshold": self.form.threshold,
        }
        if self.form.limit_share is not None:
            values["gradient/prunable.probability_limit_share"] = self.form.limit_share
        return values

    def epoch_scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        s, part = self.kept(trainer)
        sums = part.layer_sums(s).tolist()
        return {f"density/{n}": k / size for n, k, size in zip(part.names, sums, part.layout.numels, strict=True)}

    def histograms(self, trainer: Trainer) -> Mapping[str, Tensor | Counts]:
        return {f"probability/{name}": counts for name, counts in layer_histograms(*self.kept(trainer)).items()}

    def _decided(self, trainer: Trainer) -> Tensor:
        _, state, part = trainer.sharded.optimizer.group(PRUNABLE)
        s = state["probability"]
        decided = (s < DECIDED) | (s > 1 - DECIDED)
        return decided.double().mean() if "probability" in self.form.whole else part.sum(decided) / part.total


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


def mask_lines(masks: Mapping[str, Tensor], granularity: str = "weight") -> list[str]:
    """What to tell about new masks, beside what is wrong with them (see `checking`)."""
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    lines = [f"mask: density {kept / total:.6g}, {kept:,} of {total:,} weights in {len(masks)} layers"]
    if granularity in ("channel", "kernel"):
        dims = 1 if granularity == "channel" else 2
        removed = sum(removed_units(m, dims) for m in masks.values())
        units = sum(m.shape[:dims].numel() for m in masks.values())
        lines.append(f"mask: {removed:,} of {units:,} {granularity}s removed")
    return lines


def removed_units(mask: Tensor, dims: int = 1) -> int:
    """How many output channels (dims = 1) or kernels (dims = 2) of a layer keep no weight."""
    return int((~mask.flatten(dims).any(dims) if mask.dim() > dims else ~mask).sum())
