"""magnitude: the largest |w| of a trained network stay, in one shot, and are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.position import Phase
from ghostmask.engine.trainer import Trainer
from ghostmask.masks.masked_model import FixedMasks, MaskedModel
from ghostmask.masks.method import FINETUNE, MaskMethod, Setup
from ghostmask.masks.one_shot import report
from ghostmask.masks.report import DensityReport
from ghostmask.masks.scoring.allocation import kept_masks
from ghostmask.masks.trained import load_trained


class Magnitude(MaskMethod):
    """One-shot magnitude pruning (PBW, Han et al. 2015): phase "train" (dense), then "finetune" under the mask.

    With mask.path the dense training is left out and the network found there is pruned instead.
    """

    fixed: FixedMasks | None = None
    protects = True

    def phases(self) -> tuple[tuple[str, int], ...]:
        dense = () if self.config.path else (("train", self.recipe.epochs),)
        return (*dense, (FINETUNE, self.recipe.finetune.epochs))

    def prepare(self) -> None:
        if self.config.path:
            load_trained(self.net, self.config.path)

    def enter(self, phase: Phase) -> Setup:
        if phase.name != FINETUNE:
            return Setup(self.net, [self.weight_group(phase)])
        # On a resume these masks come from untrained weights; the checkpoint's take their place.
        self.fixed = FixedMasks(self._largest())
        model = MaskedModel(self.net, list(self.weights), self.fixed)
        return Setup(model, [self.weight_group(phase)], [DensityReport(self.fixed)])

    def begin(self, trainer: Trainer) -> None:
        if self.fixed is not None:
            for line in report(self.masks(), self.protects):
                trainer.reporter.progress.message(line)
        super().begin(trainer)

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        return self._largest()

    def masks(self) -> Mapping[str, Tensor]:
        assert self.fixed is not None
        return self.fixed.masks()

    def _largest(self) -> dict[str, Tensor]:
        config = self.config
        return magnitude_masks(self.weights, config.density, config.constraint, config.min_per_layer)


def magnitude_masks(
    weights: Mapping[str, Tensor], density: float, constraint: str, min_per_layer: int = 0
) -> dict[str, Tensor]:
    """Masks of the largest |w|: exactly round(density n) of the network ("global", at least min_per_layer of each
    layer) or of each layer ("layerwise")."""
    scores = [w.detach().abs() for w in weights.values()]
    return dict(zip(weights, kept_masks(scores, density, constraint, min_per_layer), strict=True))
