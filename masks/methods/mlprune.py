"""mlprune: the weights whose removal costs most loss by a Kronecker-factored Hessian (K-FAC) stay, in one pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.masks.one_shot import Scored
from ghostmask.masks.scoring.kronecker import KroneckerFactors, inverse_diagonals, scores_of
from ghostmask.masks.scoring.score_images import Chunk, First, chosen_images
from ghostmask.masks.scoring.score_shards import ScoreShards

BATCHES = 10
"""Chunks of mask.score_batch images, unless mask.score_batches says otherwise."""


class MlPrune(Scored):
    """MLPrune (Zeng & Urtasun 2019): score w^2 / (diag(G^-1) x diag(A^-1)), divided by its layer's sum.

    A = E[a a^T] over a layer's inputs (patches of a convolution), G = E[g g^T] over the gradients by its outputs,
    labels drawn from the network's own predictions. Meant for a trained network: give mask.path.
    """

    def scores(self, data: DataPipeline, shards: ScoreShards) -> Tensor:
        """Collective: the normalised score of this rank's slice, (end - first,), float64; larger = kept."""
        config = self.config
        count = (config.score_batches or BATCHES) * config.score_batch
        factors = KroneckerFactors(self.net, list(self.weights), self.recipe.seed)
        chunks: Iterator[Chunk] = chosen_images(data, 0, First(count), config.score_batch, self.world)
        for chunk in chunks:
            factors.add(chunk)
        diagonals = inverse_diagonals(factors.reduced(self.world), config.damping, self.world)
        return shards.own(scores_of(self.weights, diagonals))
