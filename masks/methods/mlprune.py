"""mlprune: the weights whose removal costs most loss by a Kronecker-factored Hessian (K-FAC) stay, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.one_shot import Scored
from ghostmask.masks.scoring.kronecker import KroneckerFactors
from ghostmask.masks.scoring.score_images import chosen_images
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
    blind_at_zero = True
    prunes_trained = True
    paper = (
        'Zeng & Urtasun 2019, "MLPrune: Multi-Layer Pruning for Automated Neural Network Compression", '
        "https://openreview.net/forum?id=r1g5b2RcKm"
    )
    aliases = ("mlp", "kfac", "hessian", "obd", "obs", "woodfisher", "wanda", "sparsegpt")

    def scores(self, data: DataPipeline, part: Slice) -> Tensor:
        s = self.settings
        factors = KroneckerFactors(self.net, list(self.weights), self.recipe.seed)
        for chunk in chosen_images(data, s.score_batches * s.score_batch, s.score_batch, self.world):
            factors.add(chunk)
        scores = {}
        for name, (over_inputs, over_outputs) in factors.inverse_diagonals(s.damping, self.world).items():
            w = self.weights[name].detach().double()
            score = w.square() / torch.outer(over_outputs, over_inputs).view(w.shape)
            scores[name] = score / score.sum().clamp(min=torch.finfo(score.dtype).tiny)
        return part.cut(scores)
