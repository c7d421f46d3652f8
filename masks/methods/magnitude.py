"""magnitude: the largest |w| of a trained network stay, in one shot, and are fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ghostmask.engine.config import require
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Plain, Reparametrization
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.method import FINETUNE, Finder, Start
from ghostmask.masks.report import mask_lines
from ghostmask.masks.scoring.largest import Budget, largest
from ghostmask.masks.settings import FromTrained, Protecting
from ghostmask.masks.trained import check_without_main_phase, load_trained


@dataclass(frozen=True)
class Settings(Protecting, FromTrained):
    """magnitude: with mask.path, the network found there is pruned and the dense training left out."""


class Magnitude(Finder):
    """One-shot magnitude pruning (PBW, Han et al. 2015): phase "train" (dense), then "finetune" under the mask.

    With mask.path the dense training is left out and the network found there is pruned instead.
    """

    Settings = Settings
    finetunes = True

    @classmethod
    def check(cls, settings: Any, run: Any) -> None:
        if settings.path:
            check_without_main_phase(settings.path, run)

    @classmethod
    def check_find(cls, settings: Any) -> None:
        fix = "name the trained network that mask.method=magnitude prunes"
        require(settings.path != "", "mask.path", settings.path, fix)

    def phases(self) -> tuple[tuple[str, int], ...]:
        dense = () if self.settings.path else (("train", self.recipe.epochs),)
        return (*dense, (FINETUNE, self.recipe.finetune.epochs))

    def prepare(self) -> None:
        if self.settings.path:
            load_trained(self.net, self.settings.path)

    def begin(self, phase: Phase, start: Start) -> None:
        if phase.name == FINETUNE:
            self.found = self.find(start.data)
            for line in mask_lines(self.found, self.settings):
                start.say(line)
        super().begin(phase, start)

    def reparametrization(self, phase: Phase) -> Reparametrization:
        if phase.name != FINETUNE:
            return Plain({"weight": self.rule()})
        return FixedMask(self.rule(), self.found or None)

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        s, part = self.settings, Slice.even(self.weights, self.world)
        budget = Budget(s.density, s.constraint, s.min_per_layer, self.recipe.seed)
        return part.gathered(largest(part, part.cut(self.weights).abs(), budget))
