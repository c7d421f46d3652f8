"""The numbers every method with fixed masks shows: the density, overall and per layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ghostmask.engine.hooks import Hook
from ghostmask.engine.trainer import Trainer
from ghostmask.masks.masked_model import FixedMasks, density_of


class DensityReport(Hook):
    """Logs the exact density of a FixedMasks module at every report and each layer's once per epoch."""

    def __init__(self, fixed: FixedMasks) -> None:
        self.fixed = fixed

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        return {"mask/density": density_of(self.fixed.masks())}

    def epoch_scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        return {f"density/{name}": mask.float().mean() for name, mask in self.fixed.masks().items()}
