"""snip: the weights whose loss would change most without them stay, found on one batch before training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.one_shot import Scored
from ghostmask.masks.scoring.gradient_scores import ScoreLoss
from ghostmask.masks.scoring.score_images import chosen_images
from ghostmask.masks.settings import FromTrained, Protecting, ScoringImages, number


@dataclass(frozen=True)
class Settings(Protecting, FromTrained, ScoringImages):
    """snip."""

    score_batches: int = number(1, 1)
    """How many batches of score_batch images are scored; the paper scores one."""


class Snip(Scored):
    """SNIP (Lee et al. 2019): score |dL/dm| at m = 1 = |w dL/dw|.

    Batch norm in batch-statistics mode, as in ToST's code and others; the authors' own (TensorFlow) scores in
    evaluation mode.
    """

    Settings = Settings
    blind_at_zero = True
    paper = (
        'Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", '
        "https://arxiv.org/abs/1810.02340"
    )
    aliases = ("connection_sensitivity", "sensitivity")

    def scores(self, data: DataPipeline, part: Slice) -> Tensor:
        s = self.settings
        chunks = partial(chosen_images, data, s.score_batches * s.score_batch, s.score_batch, self.world)
        gradient = part.summed(ScoreLoss(self.net, self.weights, chunks, self.world, "snip").gradient())
        return (part.cut(self.weights) * gradient).abs()
