"""random: chance decides which weights stay, evenly or by the layers' shapes (ER, ERK); the baseline of all finders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.masks.kernels.noise import generator
from ghostmask.masks.one_shot import OneShot
from ghostmask.masks.scoring.allocation import layer_counts
from ghostmask.masks.settings import FromTrained, WithDensity, choice, number


@dataclass(frozen=True)
class Settings(WithDensity, FromTrained):
    """random."""

    allocation: str = choice("erk", "er", "uniform")
    """uniform (the same density in every layer), er or erk (by the layers' shapes; erk counts kernel sizes)."""
    min_per_layer: int = number(0, 0)
    """Weights that every layer keeps at least."""


class Random(OneShot):
    """Exactly round(density n) weights, each equally likely within its layer; mask.allocation shares them out."""

    Settings = Settings
    paper = (
        'ER: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity", '
        'https://arxiv.org/abs/1707.04780; ERK: Evci et al. 2020, "Rigging the Lottery", https://arxiv.org/abs/1911.11134'
    )
    aliases = ("erk", "er mask.allocation=er", "uniform mask.allocation=uniform", "static")

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        config = self.settings
        shapes = [tuple(w.shape) for w in self.weights.values()]
        counts = layer_counts(shapes, config.density, config.allocation, config.min_per_layer)
        return {
            name: random_mask(w, count, self.recipe.seed, name)
            for (name, w), count in zip(self.weights.items(), counts, strict=True)
        }


def random_mask(like: Tensor, kept: int, seed: int, name: str) -> Tensor:
    """Bool tensor of the shape and device of `like`, `kept` ones at random: a function of (seed, name), as on all
    ranks."""
    order = generator(f"random mask {seed} {name}").permutation(like.numel())
    mask = torch.zeros(like.numel(), dtype=torch.bool)
    mask[torch.from_numpy(order[:kept])] = True
    return mask.view(like.shape).to(like.device)
