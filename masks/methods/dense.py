"""dense: no mask at all, the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ghostmask.engine.position import Phase
from ghostmask.masks.method import MaskMethod, Setup


class Dense(MaskMethod):
    """Trains every weight for train.epochs."""

    def phases(self) -> tuple[tuple[str, int], ...]:
        return (("train", self.recipe.epochs),)

    def enter(self, phase: Phase) -> Setup:
        return Setup(self.net, [self.weight_group(phase)])

    def masks(self) -> Mapping[str, Tensor]:
        return {}
