"""How does a state tensor move along its gradient: SGD and Adam, by torch's own fused kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


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

    def update(
        self, value: Tensor, gradient: Tensor, buffers: list[Tensor], lr: float, updates: int, scale: Scale
    ) -> None:
        """Move `value` in place, (n,) float32; `updates` updates were made before this one."""
        ...


@dataclass(frozen=True)
class Sgd:
    """w <- w - lr b, b <- momentum b + g + weight_decay w (torch.optim.SGD's, with nesterov as there)."""

    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)

    def update(
        self, value: Tensor, gradient: Tensor, buffers: list[Tensor], lr: float, updates: int, scale: Scale
    ) -> None:
        momentum: list[Any] = list(buffers)
        sgd(
            [value], [gradient], momentum, has_sparse_grad=False, fused=True, grad_scale=scale.divisor,
            found_inf=scale.skip, weight_decay=self.weight_decay, momentum=self.momentum, lr=lr, dampening=0.0,
            nesterov=self.nesterov, maximize=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015) with bias correction, as torch.optim.Adam computes it."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def update(
        self, value: Tensor, gradient: Tensor, buffers: list[Tensor], lr: float, updates: int, scale: Scale
    ) -> None:
        first, second = buffers
        steps = [torch.full((), float(updates), device=value.device)]
        adam(
            [value], [gradient], [first], [second], [], steps, fused=True, grad_scale=scale.divisor,
            found_inf=scale.skip, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=lr,
            weight_decay=self.weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip
