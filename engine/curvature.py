"""How sharply does a loss curve: Hessian-vector products over all ranks, and the largest eigenvalues from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ghostmask.engine.data import Batch
from ghostmask.engine.world import World

LARGEST_BASIS = 100
"""Lanczos vectors at most; each is as large as the parameters."""
TOLERANCE = 1e-3
"""Relative error estimate at which an eigenvalue counts as found."""

Logits = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(parameters by name, images) -> logits: a network as a function of its parameters."""


class Curvature:
    """The Hessian of the mean cross-entropy over fixed batches of all ranks, at `point`, within a subspace.

    masks: bool tensors by parameter name; elements where a mask is False are held at their value, parameters without a
    mask vary freely. batches: this rank's share; every image counts once. The same on every rank.
    """

    def __init__(
        self, logits: Logits, point: Mapping[str, Tensor], masks: Mapping[str, Tensor], batches: Sequence[Batch],
        world: World,
    ) -> None:  # fmt: skip
        self._logits, self._batches, self._world = logits, batches, world
        self._point = {n: p.detach() for n, p in point.items()}
        self._sizes = [p.numel() for p in self._point.values()]
        free = [masks[n].reshape(-1) if n in masks else torch.ones_like(p, dtype=torch.bool).reshape(-1)
                for n, p in self._point.items()]  # fmt: skip
        self._free = torch.cat(free)
        images = torch.tensor([sum(len(b.labels) for b in batches)], device=self._free.device)
        self._images = int(world.all_reduce(images))

    @property
    def dimension(self) -> int:
        """Parameters that vary."""
        return int(self._free.sum())

    def start(self, seed: int = 0) -> Tensor:
        """A random direction in the subspace, of length 1, the same for a seed on every rank and device."""
        like = next(iter(self._point.values()))
        drawn = torch.randn(len(self._free), generator=torch.Generator().manual_seed(seed)).to(self._free.device)
        vector = drawn.to(like.dtype) * self._free
        unit: Tensor = vector / vector.norm()
        return unit

    def product(self, vector: Tensor) -> Tensor:
        """Collective: H v. vector and result: (n,) over all parameters, end to end, zero outside the subspace."""
        parts = [v.view_as(p) for v, p in zip(torch.split(vector, self._sizes), self._point.values(), strict=True)]
        total = torch.zeros_like(vector)
        for images, labels in self._batches:
            values = [p.clone().requires_grad_() for p in self._point.values()]
            scores = self._logits(dict(zip(self._point, values, strict=True)), images)
            loss = functional.cross_entropy(scores, labels, reduction="sum")
            gradients = torch.autograd.grad(loss, values, create_graph=True)
            along = torch.stack([(g * p).sum() for g, p in zip(gradients, parts, strict=True)]).sum()
            products = torch.autograd.grad(along, values, materialize_grads=True, allow_unused=True)
            total += torch.cat([p.reshape(-1) for p in products])
        return self._world.all_reduce(total).div_(self._images).mul_(self._free)


@dataclass(frozen=True)
class Spectrum:
    """eigenvalues: the largest, descending; products: Hessian-vector products it took; converged: all within
    TOLERANCE of an eigenvalue."""

    eigenvalues: list[float]
    products: int
    converged: bool


def top_eigenvalues(
    product: Callable[[Tensor], Tensor], start: Tensor, top: int, most: int = LARGEST_BASIS
) -> Spectrum:
    """The `top` largest eigenvalues of a symmetric operator, by Lanczos' method with full reorthogonalisation.

    start: (n,) of length 1, in the subspace; most: products at most. An eigenvalue that occurs several times is found
    once. Fewer than `top` come back where the operator has fewer that differ.
    """
    basis, diagonal, beside = [start], list[float](), list[float]()
    eigenvalues, converged = torch.zeros(0), False
    while True:
        following = product(basis[-1])
        diagonal.append(float(following @ basis[-1]))
        for _ in range(2):  # once leaves rounding errors that grow into false copies of eigenvalues
            for vector in basis:
                following -= (following @ vector) * vector
        length = float(following.norm())
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            small += torch.diag(off, 1) + torch.diag(off, -1)
        eigenvalues, vectors = torch.linalg.eigh(small)
        scale = max(float(eigenvalues.abs().max()), torch.finfo(torch.float64).tiny)
        errors = length * vectors[-1, -top:].abs()
        converged = len(diagonal) >= top and bool((errors <= TOLERANCE * eigenvalues[-top:].abs()).all())
        exhausted = length <= 1e-6 * scale
        if converged or exhausted or len(basis) == most:
            largest = eigenvalues.flip(0)[:top].tolist()
            return Spectrum(largest, len(diagonal), converged or exhausted)
        beside.append(length)
        basis.append(following / length)
