"""gmp: gradual magnitude pruning, the mask shrinks along a cubic schedule while the network trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ghostmask.engine.hooks import Hook
from ghostmask.engine.position import Phase
from ghostmask.engine.trainer import Trainer
from ghostmask.masks.masked_model import FixedMasks, MaskedModel
from ghostmask.masks.method import MaskMethod, Setup
from ghostmask.masks.methods.magnitude import magnitude_masks
from ghostmask.masks.report import DensityReport
from ghostmask.masks.schedules import cubic_density


class GradualMagnitude(MaskMethod):
    """GMP (Zhu & Gupta 2017): every mask.update_every steps between mask.start_fraction and mask.end_fraction of
    training, the masks are chosen anew as the largest |w| at density 1 - (1 - density)(1 - (1 - x)^3)."""

    fixed: FixedMasks | None = None

    def phases(self) -> tuple[tuple[str, int], ...]:
        return (("train", self.recipe.epochs),)

    def enter(self, phase: Phase) -> Setup:
        fixed = FixedMasks({n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()})
        self.fixed = fixed
        model = MaskedModel(self.net, list(self.weights), fixed)
        return Setup(model, [self.weight_group(phase)], [_Shrink(self, fixed), DensityReport(fixed)])

    def masks(self) -> Mapping[str, Tensor]:
        assert self.fixed is not None
        return self.fixed.masks()


class _Shrink(Hook):
    """Chooses the masks anew when the schedule says so; a pruned weight keeps its last value, so it may return."""

    def __init__(self, method: GradualMagnitude, fixed: FixedMasks) -> None:
        self.method, self.fixed = method, fixed

    def on_step_end(self, trainer: Trainer) -> None:
        config, total = self.method.config, trainer.phase.end_step - trainer.phase.first_step
        start, end = round(config.start_fraction * total), round(config.end_fraction * total)
        done = trainer.num_updates
        if done < start or done > end or ((done - start) % config.update_every and done != end):
            return
        density = cubic_density(done, start, end, config.density)
        masks = magnitude_masks(self.method.weights, density, config.constraint)
        self.fixed.replace(list(masks.values()))
