"""One-shot finders: the mask is found before training, from a score of every weight, and stays as it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.position import Phase
from ghostmask.engine.trainer import Trainer
from ghostmask.masks.masked_model import FixedMasks, MaskedModel
from ghostmask.masks.method import MaskMethod, Setup, check_agreement
from ghostmask.masks.report import DensityReport
from ghostmask.masks.scoring.score_shards import ScoreShards, empty_layers, largest
from ghostmask.masks.trained import load_trained


class OneShot(MaskMethod):
    """Phase "train" under masks that `find` gives before its first step; a method is its `find`.

    The weights are the initialisation, or with mask.path a trained network's, and train for train.epochs.
    """

    fixed: FixedMasks | None = None
    protects = True

    @abstractmethod
    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        """Collective: the masks, equal on every rank. The network is left exactly as it is."""

    def phases(self) -> tuple[tuple[str, int], ...]:
        return (("train", self.recipe.epochs),)

    def prepare(self) -> None:
        if self.config.path:
            load_trained(self.net, self.config.path)

    def enter(self, phase: Phase) -> Setup:
        # On a resume the checkpoint's masks take the place of these, otherwise those that begin() finds.
        self.fixed = FixedMasks({n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()})
        model = MaskedModel(self.net, list(self.weights), self.fixed)
        return Setup(model, [self.weight_group(phase)], [DensityReport(self.fixed)])

    def begin(self, trainer: Trainer) -> None:
        masks = self.find(trainer.data)
        check_agreement(masks, self.world)
        for line in report(masks, self.protects):
            trainer.reporter.progress.message(line)
        assert self.fixed is not None
        self.fixed.replace(list(masks.values()))

    def masks(self) -> Mapping[str, Tensor]:
        assert self.fixed is not None
        return self.fixed.masks()

    def shards(self) -> ScoreShards:
        """This rank's slice of the prunable weights."""
        return ScoreShards(self.weights, self.world)


class Scored(OneShot):
    """A finder that scores every weight once and keeps the largest scores; a method is its `scores`."""

    @abstractmethod
    def scores(self, data: DataPipeline, shards: ScoreShards) -> Tensor:
        """Collective: the scores of this rank's slice, (end - first,); larger = kept. The network is left as it is."""

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        config, shards = self.config, self.shards()
        scores = self.scores(data, shards)
        return shards.gathered(largest(shards, scores, config.density, config.constraint, config.min_per_layer))


def report(masks: Mapping[str, Tensor], protects: bool) -> list[str]:
    """What to tell about new masks: their density and, as a warning, the layers that lost all their weights.

    protects: MaskMethod.protects of the method that made them.
    """
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    lines = [f"mask: density {kept / total:.6g}, {kept:,} of {total:,} weights in {len(masks)} layers"]
    empty = empty_layers(masks)
    if empty:
        named = f"{len(empty)} of {len(masks)} layers have no weight left: {', '.join(empty)}"
        lines.append(f"warning: {named}" + ("; mask.min_per_layer=1 keeps some" if protects else ""))
    return lines
