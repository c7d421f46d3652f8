"""dense: no mask at all, the baseline of every comparison."""

from __future__ import annotations

from typing import Any

from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Plain, Reparametrization
from ghostmask.masks.method import MaskMethod


class Dense(MaskMethod):
    """Trains every weight for train.epochs."""

    paper = "none: the network as it is"
    aliases = ("none", "baseline", "full")

    @classmethod
    def check(cls, settings: Any, run: Any) -> None:
        for name in sorted(run.given("mask") & {"dense_layers", "only"}):
            raise run.not_read("mask", name, "mask.method=dense", "a method with a mask")

    def reparametrization(self, phase: Phase) -> Reparametrization:
        return Plain({"weight": self.rule()})
