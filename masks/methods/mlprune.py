"""mlprune: the weights whose removal costs most loss by a Kronecker-factored Hessian (K-FAC) stay, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.one_shot import Scored
from ghostmask.masks.scoring.kronecker import KroneckerFactors, inverse_diagonals, scores_of
from ghostmask.masks.scoring.score_images import Choice, Chunk, chosen_images
from ghostmask.masks.settings import FromTrained, Protecting, ScoringImages, number


@dataclass(frozen=True)
class Settings(Protecting, FromTrained, ScoringImages):
    """mlprune: meant for a trained network, give mask.path."""

    score_batches: int = number(10, 1)
    """How many batches of score_batch images the factors are summed over."""
    damping: float = number(1e-3, 0, above=True)
    """Share of a Kronecker factor's mean diagonal that is added to its diagonal before it is inverted."""


class MlPrune(Scored):
    """MLPrune (Zeng & Urtasun 2019): score w^2 / (diag(G^-1) x diag(A^-1)), divided by its layer's sum.

    A = E[a a^T] over a layer's inputs (patches of a convolution), G = E[g g^T] over the gradients by its outputs,
    labels drawn from the network's own predictions. Meant for a trained network: give mask.path.
    """

    Settings = Settings

    def scores(self, data: DataPipeline, part: Slice) -> Tensor:
        """Collective: the normalised score of this rank's slice, (n,), float64; larger = kept."""
        s = self.settings
        factors = KroneckerFactors(self.net, list(self.weights), self.recipe.seed)
        count = s.score_batches * s.score_batch
        chunks: Iterator[Chunk] = chosen_images(data, Choice(count), s.score_batch, self.world)
        for chunk in chunks:
            factors.add(chunk)
        diagonals = inverse_diagonals(factors.reduced(self.world), s.damping, self.world)
        return part.cut(dict(zip(self.weights, scores_of(self.weights, diagonals), strict=True)))
