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
    logits: Logits, parameters: Mapping[str, Tensor], batches: Iterator[list[Batch]], world: World, *, steps: int,
    lr: float, eta: float, gamma: float, normalize: bool = True,
) -> Rescaled:  # fmt: skip
    """Collective: one factor per parameter tensor, by GradInit (Zhu et al. 2021) as the ToST code uses it.

    Factors start at 1 and follow Adam. In each update, with g the gradient of the loss averaged over all parts:
    |g| > gamma: the factors go down the gradient of |g| (second order); else: down the gradient of
    L(parameters - eta g / |g|) / eta (without normalize: of L(parameters - eta g) / eta), the step constant. batches:
    this rank's parts of each, at least steps + 1, as many parts on every rank; each part is a forward pass of its own.
    The look-ahead loss is taken on half of a part and half of the same part of the next batch. parameters stay as they
    are. Same result on every rank, and for every number of ranks that share the parts.
    """
    names, start = list(parameters), [p.detach() for p in parameters.values()]
    loss = _Loss(logits, names, start)
    factors = start[0].new_ones(len(start))
    floor = factors.new_tensor([0.0 if n.endswith("bias") else SMALLEST_WEIGHT_FACTOR for n in names])
    descent = _Adam(factors, lr)
    norms: list[float] = []
    losses: list[float] = []
    batch = next(batches)
    for step in range(steps):
        world.pulse.tick(f"LRsI, update {step + 1} of {steps}")
        following = next(batches)
        point = [p * f for p, f in zip(start, factors, strict=True)]
        mean = world_mean(loss.gradients(point, batch), len(batch), world, factors.dtype)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in mean))
        norms.append(norm)
        if norm > gamma:
            # d|g| / d(parameter) = H g / |g|
            direction = [m / norm for m in mean]
            kind, slope = "norm", sorted_mean([loss.curvature(point, part, direction) for part in batch], world)
        else:
            length = eta / norm if normalize and norm > 0 else eta
            ahead = [p - length * m for p, m in zip(point, mean, strict=True)]
            mixed = [_halves(a, b) for a, b in zip(batch, following, strict=True)]
            value, after = sorted_mean([loss.slopes(ahead, part) for part in mixed], world).tensor_split([1])
            losses.append(value.item())
            kind, slope = "loss", after / eta
        factors = torch.maximum(factors - descent.step(slope.to(factors.dtype).clamp(-CLIP, CLIP), kind), floor)
        batch = following
    return Rescaled(dict(zip(names, factors.tolist(), strict=True)), norms, losses)


def world_mean(sums: list[Tensor], num_parts: int, world: World, dtype: torch.dtype) -> list[Tensor]:
    """Collective: the means over all ranks' parts, in `dtype`, of float64 sums over this rank's num_parts. In float64,
    so that the mean of float32 terms does not depend on their order."""
    flat = world.all_reduce(torch.cat([t.reshape(-1) for t in sums])).div_(world.size * num_parts).to(dtype)
    return [m.view_as(t) for m, t in zip(torch.split(flat, [t.numel() for t in sums]), sums, strict=True)]


def sorted_mean(rows: list[Tensor], world: World) -> Tensor:
    """Collective: (n,) the mean of each column over all ranks' rows, (n,) each, bit for bit whoever has which rows."""
    return world.all_gather(torch.stack(rows)).flatten(0, 1).sort(0).values.mean(0)


class _Loss:
    """Cross-entropy of one part of a batch, differentiated by parameters, or by factors at the parameters `start`."""

    def __init__(self, logits: Logits, names: list[str], start: list[Tensor]) -> None:
        self.logits, self.names, self.start = logits, names, start

    def gradients(self, values: list[Tensor], parts: list[Batch]) -> list[Tensor]:
        """The sum over the parts, float64, of the gradient by the parameters at these values."""
        total = [torch.zeros_like(v, dtype=torch.float64) for v in values]
        for part in parts:
            points = _points(values)
            for whole, term in zip(total, _grad(self._of(points, part), points), strict=True):
                whole.add_(term)
        return total

    def slopes(self, values: list[Tensor], part: Batch) -> Tensor:
        """(1 + n,) float64: the loss at these values, and its derivative by each factor."""
        points = _points(values)
        loss = self._of(points, part)
        return torch.cat([loss.detach().double().reshape(1), self._by_factors(_grad(loss, points))])

    def curvature(self, values: list[Tensor], part: Batch, direction: list[Tensor]) -> Tensor:
        """(n,) float64: the derivative by each factor of the gradient's length along a constant direction."""
        points = _points(values)
        first = _grad(self._of(points, part), points, create_graph=True)
        along = torch.stack([(g * d).sum() for g, d in zip(first, direction, strict=True)]).sum()
        return self._by_factors(_grad(along, points))

    def _of(self, values: list[Tensor], part: Batch) -> Tensor:
        named = dict(zip(self.names, values, strict=True))
        return functional.cross_entropy(self.logits(named, part.images), part.labels)

    def _by_factors(self, slopes: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([(s * p).sum(dtype=torch.float64) for s, p in zip(slopes, self.start, strict=True)])


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


def _points(values: list[Tensor]) -> list[Tensor]:
    return [v.detach().requires_grad_() for v in values]


def _grad(value: Tensor, points: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, points, create_graph=create_graph, materialize_grads=True, allow_unused=True)


def _halves(first: Batch, second: Batch) -> Batch:
    half = max(1, len(first.labels) // 2)
    images = torch.cat([first.images[:half], second.images[half:]])
    return Batch(images, torch.cat([first.labels[:half], second.labels[half:]]))
