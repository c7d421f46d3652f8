"""dense: no mask at all, the baseline of every comparison."""

from __future__ import annotations

from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Plain, Reparametrization
from ghostmask.masks.method import MaskMethod


class Dense(MaskMethod):
    """Trains every weight for train.epochs."""

    def reparametrization(self, phase: Phase) -> Reparametrization:
        return Plain({"weight": self.rule()})
