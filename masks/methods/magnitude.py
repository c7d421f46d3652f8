"""magnitude: the largest |w| of a trained network stay, in one shot, and are fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ghostmask.engine.config import require
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Plain, Reparametrization
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.method import FINETUNE
from ghostmask.masks.one_shot import Scored
from ghostmask.masks.settings import FromTrained, Protecting, WithPower


@dataclass(frozen=True)
class Settings(Protecting, FromTrained, WithPower):
    """magnitude: with mask.path, the network found there is pruned and the dense training left out."""


class Magnitude(Scored):
    """One-shot magnitude pruning (PBW, Han et al. 2015): phase "train" (dense), then "finetune" under the mask."""

    Settings = Settings
    finetunes = True
    paper = (
        'Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", '
        "https://arxiv.org/abs/1506.02626"
    )
    aliases = ("pbw", "prune", "pruning", "oneshot", "topk", "l1")

    @classmethod
    def check(cls, settings: Any, run: Any) -> None:
        if not settings.path:
            return
        require(
            run.train.epochs == 0 or "epochs" not in run.given("train"),
            "train.epochs", run.train.epochs, "mask.path replaces the dense training; set train.epochs=0",
        )  # fmt: skip
        chosen = f"mask.path={settings.path}"
        for name in sorted(run.given("optim") & {"lr", "schedule", "warmup", "milestones", "gamma"}):
            raise run.not_read("optim", name, chosen, "finetune.lr, finetune.schedule")
        unread = {"ghost_skip", "ghost_swish", "lrsi"} | (set() if run.finetune.epochs else {"label_smoothing"})
        for name in sorted(run.given("tost") & unread):
            raise run.not_read("tost", name, chosen, "a method with a main phase")

    @classmethod
    def check_find(cls, settings: Any) -> None:
        fix = "name the trained network that mask.method=magnitude prunes"
        require(settings.path != "", "mask.path", settings.path, fix)

    def phases(self) -> tuple[tuple[str, int], ...]:
        dense = () if self.settings.path else (("train", self.recipe.epochs),)
        return (*dense, (FINETUNE, self.recipe.finetune.epochs))

    def begin(self, phase: Phase, data: DataPipeline, say: Callable[[str], None]) -> None:
        if phase.name == FINETUNE:
            super().begin(phase, data, say)

    def reparametrization(self, phase: Phase) -> Reparametrization:
        return super().reparametrization(phase) if phase.name == FINETUNE else Plain({"weight": self.rule()})

    def scores(self, data: DataPipeline, part: Slice) -> Tensor:
        return part.cut(self.weights).abs()
