"""sparse_vd: every weight has a trained noise, and those that drown in it are dropped (variational dropout)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ghostmask.engine.sharding.reparametrization import State
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.noisy import NoisySearch, NoisyWeights, PenalisedSettings
from ghostmask.masks.settings import number

K1, K2, K3 = 0.63576, 1.87320, 1.48695
"""Of the KL divergence's approximation (eq. 14 of the paper)."""
LARGEST_LOG_ALPHA = 8.0
"""log alpha is clipped to +- this."""
THRESHOLD = 3.0
"""A weight stays while its log alpha is below this: alpha = 20, a dropout rate of 95 %."""


@dataclass(frozen=True)
class Settings(PenalisedSettings):
    """sparse_vd: mask.penalty is the weight of the KL divergence; 1 / number of training images is the paper's."""

    log_variance: float = number(-10.0, -40, 10)
    """log sigma^2 that every weight starts with."""
    ramp_fraction: float = number(0.1, 0, 1)
    """Fraction of train.epochs in which the weight of the KL divergence grows from 0 to mask.penalty."""


class SparseVariationalDropout(NoisySearch):
    """Sparse VD (Molchanov et al. 2017): theta = mu + sigma eps, eps ~ N(0, 1), under the penalty KL(q || log-uniform).

    -KL = K1 sigmoid(K2 + K3 log alpha) - 0.5 log(1 + 1 / alpha) - K1,  log alpha = log sigma^2 - log(mu^2 + 1e-8)

    Here the weights are noisy, one draw for all images of a part of the batch in each of mask.samples x mask.noises
    samples. The papers draw the noise of each image's activations instead (local reparametrization), whose gradients
    vary less: more samples come closer to them. Delivered: mu where log alpha < 3.
    """

    Settings = Settings
    paper = (
        'Molchanov et al. 2017, "Variational Dropout Sparsifies Deep Neural Networks", https://arxiv.org/abs/1701.05369'
    )
    aliases = ("vd", "variational", "variational_dropout", "sparsevd")

    def noisy(self, rate: float, steps: int) -> NoisyWeights:
        s = self.settings
        return Gaussian(self.rule(), rate, s.log_variance, s.penalty, round(s.ramp_fraction * steps))


class Gaussian(NoisyWeights):
    """State "weight" (mu) and "log_variance" (log sigma^2)."""

    second = "log_variance"

    def noise(self, uniform: Tensor) -> Tensor:
        normal: Tensor = torch.special.ndtri(uniform)
        return normal

    def sampled(self, weight: Tensor, second: Tensor, noise: Tensor) -> Tensor:
        return weight + (0.5 * second).exp() * noise

    def penalty(self, weight: Tensor, second: Tensor) -> Tensor:
        x = log_alpha(weight, second)
        return K1 - K1 * torch.sigmoid(K2 + K3 * x) + 0.5 * softplus(-x)

    def kept(self, weight: Tensor, second: Tensor) -> Tensor:
        return log_alpha(weight, second) < THRESHOLD

    def scale(self, state: State, part: Slice, factors: Mapping[str, float]) -> None:
        super().scale(state, part, factors)
        for s in part.segments:
            state[self.second][s.start : s.start + s.numel] += 2 * math.log(factors.get(s.name, 1.0))


def log_alpha(weight: Tensor, second: Tensor) -> Tensor:
    """log(sigma^2 / mu^2), clipped."""
    return (second - (weight.square() + 1e-8).log()).clamp(-LARGEST_LOG_ALPHA, LARGEST_LOG_ALPHA)
