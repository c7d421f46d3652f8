"""snip: the weights whose loss would change most without them stay, found on one batch before training."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.masks.one_shot import Scored
from ghostmask.masks.scoring.gradient_scores import ScoreLoss
from ghostmask.masks.scoring.score_images import Chunk, First, chosen_images
from ghostmask.masks.scoring.score_shards import ScoreShards

BATCHES = 1
"""Chunks of mask.score_batch images, unless mask.score_batches says otherwise: the paper's one batch."""


class Snip(Scored):
    """SNIP (Lee et al. 2019): score |dL/dm| at m = 1 = |w dL/dw|, batch norm in batch-statistics mode."""

    def scores(self, data: DataPipeline, shards: ScoreShards) -> Tensor:
        """Collective: |w dL/dw| of this rank's slice, (end - first,), L summed over the images; larger = kept."""
        config = self.config
        count = (config.score_batches or BATCHES) * config.score_batch

        def chunks() -> Iterator[Chunk]:
            return chosen_images(data, 0, First(count), config.score_batch, self.world)

        gradient = shards.summed(ScoreLoss(self.net, self.weights, chunks, self.world).gradient())
        return (shards.own(self.weights.values()) * gradient).abs()
