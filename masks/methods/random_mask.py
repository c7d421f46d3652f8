"""random: chance decides which weights stay, evenly or by the layers' shapes (ER, ERK); the baseline of all finders."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.masks.drawn import Allocated, Drawn
from ghostmask.masks.one_shot import OneShot
from ghostmask.masks.settings import FromTrained


@dataclass(frozen=True)
class Settings(Allocated, FromTrained):
    """random."""


class Random(Drawn, OneShot):
    """Exactly round(density n) weights, each equally likely within its layer; mask.allocation shares them out. Or
    kernels, or N weights of every block of M."""

    Settings = Settings
    paper = (
        'ER: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity", '
        'https://arxiv.org/abs/1707.04780; ERK: Evci et al. 2020, "Rigging the Lottery", https://arxiv.org/abs/1911.11134'
    )
    aliases = ("erk", "er mask.allocation=er", "uniform mask.allocation=uniform", "static")

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        return self.drawn()
