"""By which factor should each parameter tensor of an initialisation be multiplied, so that training starts well?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ghostmask.engine.data import Batch
from ghostmask.engine.world import World

SMALLEST_WEIGHT_FACTOR = 0.01
"""Lower bound of the factors of weights; that of biases is 0."""
CLIP = 1.0
"""Largest magnitude of the gradient of one factor."""
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's."""

Logits = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(parameters by name, images) -> logits: a network as a function of its parameters."""


@dataclass(frozen=True)
class Rescaled:
    """factors: per parameter name; gradient_norms: of the whole gradient, before each update; losses: after the
    look-ahead step, of the updates that minimised it."""

    factors: dict[str, float]
    gradient_norms: list[float]
    losses: list[float]


def learn_factors(
    logits: Logits, parameters: Mapping[str, Tensor], batches: Iterator[Batch], world: World, *, steps: int, lr: float,
    eta: float, gamma: float,
) -> Rescaled:  # fmt: skip
    """Collective: one factor per parameter tensor, by GradInit (Zhu et al. 2021) as the ToST code uses it.

    Factors start at 1 and follow Adam. In each update, with g the gradient of the loss averaged over all ranks:
    |g| > gamma: the factors go down the gradient of |g| (second order); else: down the gradient of
    L(parameters - eta g) / eta, g constant. batches: this rank's, at least steps + 1; the look-ahead loss is
    taken on half of a batch and half of the next one. parameters stay as they are. Same result on every rank.
    """
    names, start = list(parameters), [p.detach() for p in parameters.values()]
    factors = start[0].new_ones(len(start))
    floor = factors.new_tensor([0.0 if n.endswith("bias") else SMALLEST_WEIGHT_FACTOR for n in names])
    descent = {"norm": _Adam(factors, lr), "loss": _Adam(factors, lr)}  # two objectives, each with its own moments
    norms: list[float] = []
    losses: list[float] = []
    batch = next(batches)
    for _ in range(steps):
        following = next(batches)
        point = [(p * f).requires_grad_() for p, f in zip(start, factors, strict=True)]
        loss = _loss(logits, names, point, batch)
        gradients = torch.autograd.grad(loss, point, create_graph=True)
        mean = world_mean([g.detach() for g in gradients], world)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in mean))
        norms.append(norm)
        if norm > gamma:
            # d|g| / d(parameter) = H g / |g|: the ranks' products add up, so only their slopes are exchanged.
            along = torch.stack([(g * m / norm).sum() for g, m in zip(gradients, mean, strict=True)]).sum()
            slopes = torch.autograd.grad(along, point, materialize_grads=True, allow_unused=True)
            kind, scale = "norm", 1.0
        else:
            ahead = [(p.detach() - eta * m).requires_grad_() for p, m in zip(point, mean, strict=True)]
            ahead_loss = _loss(logits, names, ahead, _halves(batch, following))
            slopes = torch.autograd.grad(ahead_loss, ahead)
            losses.append(float(world_mean([ahead_loss.detach().reshape(1)], world)[0]))
            kind, scale = "loss", 1.0 / eta
        own = torch.stack([(s * p).sum() for s, p in zip(slopes, start, strict=True)]) * scale
        slope = world_mean([own], world)[0]
        factors = torch.maximum(factors - descent[kind].step(slope.clamp(-CLIP, CLIP)), floor)
        batch = following
    return Rescaled(dict(zip(names, factors.tolist(), strict=True)), norms, losses)


def world_mean(tensors: list[Tensor], world: World) -> list[Tensor]:
    """Collective: the mean over the ranks of each tensor, in one all-reduce."""
    flat = world.all_reduce(torch.cat([t.reshape(-1) for t in tensors])).div_(world.size)
    return [m.view_as(t) for m, t in zip(torch.split(flat, [t.numel() for t in tensors]), tensors, strict=True)]


class _Adam:
    """The steps of Adam for one vector."""

    def __init__(self, like: Tensor, lr: float) -> None:
        self.lr, self.count = lr, 0
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, gradient: Tensor) -> Tensor:
        """What to subtract for this gradient."""
        self.count += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        unbiased = (self.second / (1 - BETAS[1] ** self.count)).sqrt_() + EPSILON
        return self.lr * self.first / (1 - BETAS[0] ** self.count) / unbiased


def _loss(logits: Logits, names: list[str], values: list[Tensor], batch: Batch) -> Tensor:
    return functional.cross_entropy(logits(dict(zip(names, values, strict=True)), batch.images), batch.labels)


def _halves(first: Batch, second: Batch) -> Batch:
    half = max(1, len(first.labels) // 2)
    images = torch.cat([first.images[:half], second.images[half:]])
    return Batch(images, torch.cat([first.labels[:half], second.labels[half:]]))
