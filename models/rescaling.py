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
    eta: float, gamma: float, normalize: bool = True, parts: int = 1,
) -> Rescaled:  # fmt: skip
    """Collective: one factor per parameter tensor, by GradInit (Zhu et al. 2021) as the ToST code uses it.

    Factors start at 1 and follow Adam. In each update, with g the gradient of the loss averaged over all ranks:
    |g| > gamma: the factors go down the gradient of |g| (second order); else: down the gradient of
    L(parameters - eta g / |g|) / eta (without normalize: of L(parameters - eta g) / eta), the step constant. batches:
    this rank's, at least steps + 1; the look-ahead loss is taken on half of a batch and half of the next one. parts:
    pieces of equal size that each batch consists of, as many on every rank; each is a forward pass of its own, with its
    own batch norm statistics. parameters stay as they are. Same result on every rank.
    """
    names, start = list(parameters), [p.detach() for p in parameters.values()]
    loss = _Loss(logits, names)
    factors = start[0].new_ones(len(start))
    floor = factors.new_tensor([0.0 if n.endswith("bias") else SMALLEST_WEIGHT_FACTOR for n in names])
    descent = _Adam(factors, lr)
    norms: list[float] = []
    losses: list[float] = []
    batch = _pieces(next(batches), parts)
    for _ in range(steps):
        following = _pieces(next(batches), parts)
        point = [p * f for p, f in zip(start, factors, strict=True)]
        _, gradient = loss.gradient(point, batch)
        mean = world_mean(gradient, world)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in mean))
        norms.append(norm)
        if norm > gamma:
            slopes, kind, scale = loss.hessian_product(point, batch, [m / norm for m in mean]), "norm", 1.0
        else:
            length = eta / norm if normalize and norm > 0 else eta
            ahead = [p - length * m for p, m in zip(point, mean, strict=True)]
            value, slopes = loss.gradient(ahead, [_halves(a, b) for a, b in zip(batch, following, strict=True)])
            losses.append(float(world_mean([value.reshape(1)], world)[0]))
            kind, scale = "loss", 1.0 / eta
        # The slopes by the factors add up over the ranks, so only they are exchanged.
        own = torch.stack([(s * p).sum() for s, p in zip(slopes, start, strict=True)]) * scale
        slope = world_mean([own], world)[0]
        factors = torch.maximum(factors - descent.step(slope.clamp(-CLIP, CLIP), kind), floor)
        batch = following
    return Rescaled(dict(zip(names, factors.tolist(), strict=True)), norms, losses)


def world_mean(tensors: list[Tensor], world: World) -> list[Tensor]:
    """Collective: the mean over the ranks of each tensor, in one all-reduce."""
    flat = world.all_reduce(torch.cat([t.reshape(-1) for t in tensors])).div_(world.size)
    return [m.view_as(t) for m, t in zip(torch.split(flat, [t.numel() for t in tensors]), tensors, strict=True)]


class _Loss:
    """Cross-entropy as a function of the parameters, averaged over the pieces of this rank's batch."""

    def __init__(self, logits: Logits, names: list[str]) -> None:
        self.logits, self.names = logits, names

    def gradient(self, values: list[Tensor], pieces: list[Batch]) -> tuple[Tensor, list[Tensor]]:
        """(loss, its gradient) at these values of the parameters."""
        total, slopes = values[0].new_zeros(()), [torch.zeros_like(v) for v in values]
        for piece in pieces:
            points = [v.detach().requires_grad_() for v in values]
            loss = self._of(points, piece) / len(pieces)
            total += loss.detach()
            _add(slopes, torch.autograd.grad(loss, points, materialize_grads=True, allow_unused=True))
        return total, slopes

    def hessian_product(self, values: list[Tensor], pieces: list[Batch], vector: list[Tensor]) -> list[Tensor]:
        """H v. With v = g / |g|, g the gradient, this is the gradient of |g| by the parameters."""
        slopes = [torch.zeros_like(v) for v in values]
        for piece in pieces:
            points = [v.detach().requires_grad_() for v in values]
            loss = self._of(points, piece) / len(pieces)
            first = torch.autograd.grad(loss, points, create_graph=True, materialize_grads=True, allow_unused=True)
            along = torch.stack([(g * v).sum() for g, v in zip(first, vector, strict=True)]).sum()
            _add(slopes, torch.autograd.grad(along, points, materialize_grads=True, allow_unused=True))
        return slopes

    def _of(self, values: list[Tensor], piece: Batch) -> Tensor:
        named = dict(zip(self.names, values, strict=True))
        return functional.cross_entropy(self.logits(named, piece.images), piece.labels)


class _Adam:
    """The steps of Adam for one vector under two objectives, as GradInit's code takes them.

    Each objective has its own first moment, corrected by its own number of steps; the second moment is shared by both
    and corrected by the number of all steps.
    """

    def __init__(self, like: Tensor, lr: float) -> None:
        self.lr = lr
        self.first = {kind: torch.zeros_like(like) for kind in ("norm", "loss")}
        self.count = dict.fromkeys(self.first, 0)
        self.second = torch.zeros_like(like)

    def step(self, gradient: Tensor, kind: str) -> Tensor:
        """What to subtract for this gradient of the objective `kind`."""
        self.count[kind] += 1
        first = self.first[kind].lerp_(gradient, 1 - BETAS[0]) / (1 - BETAS[0] ** self.count[kind])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        unbiased = (self.second / (1 - BETAS[1] ** sum(self.count.values()))).sqrt_() + EPSILON
        return self.lr * first / unbiased


def _add(total: list[Tensor], part: tuple[Tensor, ...]) -> None:
    for whole, term in zip(total, part, strict=True):
        whole.add_(term)


def _pieces(batch: Batch, parts: int) -> list[Batch]:
    return [Batch(*piece) for piece in zip(batch.images.chunk(parts), batch.labels.chunk(parts), strict=True)]


def _halves(first: Batch, second: Batch) -> Batch:
    half = max(1, len(first.labels) // 2)
    images = torch.cat([first.images[:half], second.images[half:]])
    return Batch(images, torch.cat([first.labels[:half], second.labels[half:]]))
