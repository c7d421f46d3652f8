"""A small network and its gradients in float64: methods are held against the papers' equations on it, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ghostmask.engine.sharding.optimizer import Sampling, ShardedOptimizer
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Reparametrization, State
from ghostmask.masks.kernels.noise import noise_key, random_words
from ghostmask.masks.masked import PRUNABLE, Masked

STEPS, SEED, LR = 20, 5, 0.05
Weights = dict[str, Tensor]


class SmallStep:
    """A convolution and a linear layer, 108 weights, and one batch."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3, bias=False)
        ).double()
        self.images, self.labels = torch.randn(24, 2, 4, 4, dtype=torch.float64), torch.arange(24) % 3
        self.initial = {n: p.detach().float().clone() for n, p in self.net.named_parameters()}

    def loss(self, theta: Weights) -> Tensor:
        """() float64."""
        wide = {n: t.double() for n, t in theta.items()}
        return nn.functional.cross_entropy(functional_call(self.net, wide, (self.images,)), self.labels)

    def trained(self, form: Reparametrization) -> Iterator[tuple[Weights, Weights, State]]:
        """(theta that was trained with, masks after it, the state after it) of each step of ghostmask's optimizer."""
        parameters = {n: nn.Parameter(t.clone()) for n, t in self.initial.items()}
        group = ParameterGroup(PRUNABLE, parameters, form, LR)
        optimizer = ShardedOptimizer([group], sampling=Sampling(SEED))
        for _ in range(STEPS):
            theta = {n: p.detach().clone() for n, p in parameters.items()}
            optimizer.zero_grad()
            self.loss(parameters).backward()
            optimizer.step()
            _, state, part = optimizer.group(PRUNABLE)
            assert isinstance(form, Masked)
            yield theta, part.gathered(form.mask(state, part)), state

    def by_name(self, flat: Tensor) -> Weights:
        """The elements of all weights, end to end, by weight."""
        parts = torch.split(flat, [t.numel() for t in self.initial.values()])
        return {n: p.view(t.shape) for (n, t), p in zip(self.initial.items(), parts, strict=True)}


def uniforms(step: int, count: int) -> Tensor:
    """(count,) float64: the uniform numbers of a step's noise, by index."""
    return (random_words(noise_key(SEED, step, 0), 0, count, "cpu").double() + 0.5) / 2**32


def flat(weights: Weights) -> Tensor:
    """All elements end to end, float64."""
    return torch.cat([t.detach().double().reshape(-1) for t in weights.values()])


def assert_equal(ours: Tensor, expected: Tensor, what: str) -> None:
    """To 1e-6."""
    worst = float((ours.double() - expected.detach()).abs().max())
    assert worst < 1e-6, f"{what}: differs by {worst:.2g}"


def slope_by_differences(function: Callable[[Tensor], Tensor | float], at: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of a function of a float64 vector, by central differences."""
    found = torch.zeros_like(at)
    for i in range(len(at)):
        moved = torch.zeros_like(at)
        moved[i] = step
        found[i] = (function(at + moved) - function(at - moved)) / (2 * step)
    return found
