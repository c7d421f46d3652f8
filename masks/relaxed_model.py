"""The trained probabilities of ProbMask: noisy masks while training, the most probable mask in evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ghostmask.masks.kernels.noise import NoiseKey
from ghostmask.masks.kernels.relaxed_mask import relaxed_weights
from ghostmask.masks.masked_model import key
from ghostmask.masks.scoring.allocation import kept_masks


class RelaxedMasks(nn.Module):
    """weights -> [w * m], m the relaxed Bernoulli(s) mask of eq. 4.

    One probability per weight, 1 at the start (algorithm 1). In evaluation mode m is the mask that would be kept if the
    search ended now: the round(density n) most probable weights. density: the constraint's, at present; channels_last:
    make masked weights in that order while training, because convolutions would copy them into it.
    """

    def __init__(self, weights: Mapping[str, Tensor], constraint: str) -> None:
        super().__init__()
        self.names, self.constraint = tuple(weights), constraint
        for name, weight in weights.items():
            shape = torch.ones_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
            self.register_parameter(key(name), nn.Parameter(shape))
        self.density = 1.0
        self.channels_last = False
        # Tensors, since a number that changes would make torch.compile start again; functions of the position, since
        # then a resume needs nothing from them.
        self.register_buffer("temperature", torch.ones(()), persistent=False)
        self.register_buffer("noise", NoiseKey(0, 0, 0, 0).tensor(), persistent=False)
        self._most_probable: list[Tensor] | None = None

    def probabilities(self) -> dict[str, nn.Parameter]:
        """The live probabilities, each of its weight's shape, in [0, 1], by weight name."""
        return {n: self.get_parameter(key(n)) for n in self.names}

    def set_noise(self, key: NoiseKey) -> None:
        """The noise of the forward passes that follow."""
        self.get_buffer("noise").copy_(key.tensor(), non_blocking=True)

    def set_temperature(self, temperature: float) -> None:
        """tau of the forward passes that follow, above 0."""
        self.get_buffer("temperature").fill_(temperature)

    def train(self, mode: bool = True) -> RelaxedMasks:
        self._most_probable = None
        return super().train(mode)

    def forward(self, weights: list[Tensor]) -> list[Tensor]:
        probabilities: list[Tensor] = list(self.probabilities().values())
        if self.training:
            noise, temperature = self.get_buffer("noise"), self.get_buffer("temperature")
            return relaxed_weights(weights, probabilities, noise, temperature, channels_last=self.channels_last)
        if self._most_probable is None:
            self._most_probable = kept_masks([s.detach() for s in probabilities], self.density, self.constraint)
        return [w * m for w, m in zip(weights, self._most_probable, strict=True)]
