"""The trained probabilities of ProbMask: noisy masks while training, the most probable mask in evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from masks.allocation import kept_masks
from masks.masked_model import key
from masks.relaxed_mask import NoiseKey, relaxed_weights


class RelaxedMasks(nn.Module):
    """weights -> [w * m], m the relaxed Bernoulli(s) mask of eq. 4 at `temperature` with the noise of `noise`.

    One probability per weight, 1 at the start (algorithm 1). In evaluation mode m is the mask that would be kept if the
    search ended now: the round(density n) most probable weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], constraint: str) -> None:
        super().__init__()
        self.names, self.constraint = tuple(weights), constraint
        for name, weight in weights.items():
            shape = torch.ones_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
            self.register_parameter(key(name), nn.Parameter(shape))
        self.temperature, self.density = 1.0, 1.0
        self.noise = NoiseKey(seed=0, step=0, sample=0, rank=0)
        self._most_probable: list[Tensor] | None = None

    def probabilities(self) -> dict[str, nn.Parameter]:
        """The live probabilities, each of its weight's shape, in [0, 1], by weight name."""
        return {n: self.get_parameter(key(n)) for n in self.names}

    def train(self, mode: bool = True) -> RelaxedMasks:
        self._most_probable = None
        return super().train(mode)

    def forward(self, weights: list[Tensor]) -> list[Tensor]:
        probabilities = list(self.probabilities().values())
        if self.training:
            return relaxed_weights(weights, probabilities, self.noise, self.temperature)
        if self._most_probable is None:
            self._most_probable = kept_masks([s.detach() for s in probabilities], self.density, self.constraint)
        return [w * m for w, m in zip(weights, self._most_probable, strict=True)]
