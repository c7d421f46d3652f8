"""How does a state tensor move along its gradient: SGD and Adam, by torch's own fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ghostmask.engine.sharding.slices import Slice

LANES = 64
"""Elements of which torch's CPU kernels compute every full row in vector registers, whatever the processor."""


@dataclass(frozen=True)
class Scale:
    """What a rule does to a gradient first: divide it by `divisor`, and do nothing at all where `skip` is 1.

    Both () float32 on the gradient's device: torch's kernels read them there, so that nobody waits for the device.
    """

    divisor: Tensor
    skip: Tensor


class UpdateRule(Protocol):
    """Holds settings only; the tensors belong to the optimizer."""

    buffers: ClassVar[tuple[str, ...]]
    """Tensors kept for each state tensor, of its shape, zero before the first update."""

    def adapt(self, value: Tensor, gradient: Tensor, counted: Callable[[], Tensor], part: Slice, scale: Scale) -> Scale:
        """Collective: before `update`, change the gradient by what whole parameters say; returns the scale that is left
        to apply. counted: `value` as the network sees it, 0 where it is pruned."""
        ...

    def update(
        self, value: Tensor, gradient: Tensor, buffers: list[Tensor], lr: float, updates: int, scale: Scale
    ) -> None:
        """Move `value` in place, (n,) float32; `updates` updates were made before this one.

        What happens to an element depends on nothing but its own numbers: slices cut otherwise give the same bits.
        """
        ...


class ByElement:
    """A rule in which an element's numbers are all that counts."""

    def adapt(self, value: Tensor, gradient: Tensor, counted: Callable[[], Tensor], part: Slice, scale: Scale) -> Scale:
        return scale


@dataclass(frozen=True)
class Sgd(ByElement):
    """w <- w - lr b, b <- momentum b + g + weight_decay w (torch.optim.SGD's, with nesterov as there)."""

    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)

    def update(
        self, value: Tensor, gradient: Tensor, buffers: list[Tensor], lr: float, updates: int, scale: Scale
    ) -> None:
        for rows in _in_rows(value, gradient, *buffers):
            with rows as (w, g, b):
                momentum: list[Any] = [b]
                sgd(
                    [w], [g], momentum, has_sparse_grad=False, fused=True, grad_scale=scale.divisor,
                    found_inf=scale.skip, weight_decay=self._decay(), momentum=self.momentum, lr=lr, dampening=0.0,
                    nesterov=self.nesterov, maximize=False,
                )  # fmt: skip

    def _decay(self) -> float:
        return self.weight_decay


@dataclass(frozen=True)
class Adam(ByElement):
    """Adam (Kingma & Ba 2015) with bias correction, as torch.optim.Adam computes it."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def update(
        self, value: Tensor, gradient: Tensor, buffers: list[Tensor], lr: float, updates: int, scale: Scale
    ) -> None:
        for rows in _in_rows(value, gradient, *buffers):
            with rows as (s, g, first, second):
                steps = [torch.full((), float(updates), device=value.device)]
                adam(
                    [s], [g], [first], [second], [], steps, fused=True, grad_scale=scale.divisor,
                    found_inf=scale.skip, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=lr,
                    weight_decay=self.weight_decay, eps=self.eps, maximize=False,
                )  # fmt: skip


def _in_rows(*tensors: Tensor) -> Iterator[Any]:
    """The tensors in pieces of whole rows of LANES elements: torch's CPU kernels round what is left over otherwise."""
    numel = len(tensors[0])
    whole = numel if tensors[0].is_cuda else numel // LANES * LANES
    if whole:
        yield _as_they_are([t[:whole] for t in tensors])
    if whole < numel:
        yield _filled_up([t[whole:] for t in tensors])


@contextmanager
def _as_they_are(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    yield tensors


@contextmanager
def _filled_up(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    rows = [torch.nn.functional.pad(t, (0, LANES - len(t))) for t in tensors]
    yield rows
    for tensor, row in zip(tensors, rows, strict=True):
        tensor.copy_(row[: len(tensor)])
