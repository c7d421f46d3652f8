"""l0: every weight, or output channel, has a trained random gate that can close, and open gates cost (L0 norm)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.masks.noisy import NoisyChannels, NoisySearch, NoisyWeights, PenalisedSettings
from ghostmask.masks.settings import choice, number

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""beta, gamma and zeta of the paper."""


@dataclass(frozen=True)
class Settings(PenalisedSettings):
    """l0: mask.penalty is lambda, the cost of an open gate (a channel's: times its weights)."""

    gates: str = choice("weight", "channel")
    """What has a gate of its own: every weight, or every output channel."""
    open_fraction: float = number(0.5, 0.01, 0.99)
    """sigmoid(log a) that every gate starts with."""


class HardConcrete(NoisySearch):
    """L0 regularisation (Louizos et al. 2018): theta = w z, with the hard concrete gate

    z = clip(1.2 sigmoid((log u - log(1 - u) + log a) / (2/3)) - 0.1, 0, 1),  u uniform

    under the penalty sum P(z != 0) = sum sigmoid(log a - (2/3) log(0.1 / 1.1)). Delivered: w z at u = 1/2 without the
    temperature, w clip(1.2 sigmoid(log a) - 0.1, 0, 1). One draw for all images of a part of the batch, as in the
    paper. The gates start equal, without the paper's jitter of 0.01: their weights differ.
    """

    Settings = Settings
    paper = (
        'Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", '
        "https://arxiv.org/abs/1712.01312"
    )
    aliases = ("hard_concrete", "l0_norm", "gates")

    def noisy(self, rate: float, steps: int) -> NoisyWeights:
        s = self.settings
        form = ChannelGates if s.gates == "channel" else WeightGates
        return form(self.rule(), rate, math.log(s.open_fraction / (1 - s.open_fraction)), s.penalty)


class WeightGates(NoisyWeights):
    """State "weight" and "log_odds" (log a)."""

    second = "log_odds"

    def noise(self, uniform: Tensor) -> Tensor:
        return torch.logit(uniform)

    def sampled(self, weight: Tensor, second: Tensor, noise: Tensor) -> Tensor:
        return weight * stretched((noise + second) / TEMPERATURE)

    def penalty(self, weight: Tensor, second: Tensor) -> Tensor:
        return torch.sigmoid(second - TEMPERATURE * math.log(-LOW / HIGH))

    def kept(self, weight: Tensor, second: Tensor) -> Tensor:
        return stretched(second) > 0

    def expected(self, weight: Tensor, second: Tensor) -> Tensor:
        return weight * stretched(second)


class ChannelGates(WeightGates, NoisyChannels):
    """The gates of output channels."""

    whole = (WeightGates.second,)


def stretched(logit: Tensor) -> Tensor:
    """sigmoid, stretched to (LOW, HIGH) and cut at 0 and 1."""
    return ((HIGH - LOW) * torch.sigmoid(logit) + LOW).clamp(0, 1)
