"""The one optimizer of a run: parameter groups, each with its update rule and an optional projection of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd
from torch.profiler import record_function

from ghostmask.engine.sharding.shards import Shard


class UpdateRule(Protocol):
    """How a parameter moves along its gradient. Holds settings only; the state belongs to the optimizer."""

    state_names: ClassVar[tuple[str, ...]]
    """Tensors kept per parameter, of the parameter's shape, zero before the first update."""

    def update(
        self, params: list[Tensor], grads: list[Tensor], state: list[dict[str, Tensor]], lr: float, updates: int
    ) -> None:
        """Move params in place; `updates` updates were made before this one."""
        ...


@dataclass(frozen=True)
class Sgd:
    """w <- w - lr b, b <- momentum b + g + weight_decay w (torch.optim.SGD's, with nesterov as there)."""

    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    state_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def update(
        self, params: list[Tensor], grads: list[Tensor], state: list[dict[str, Tensor]], lr: float, updates: int
    ) -> None:
        buffers: list[Tensor | None] = [s["momentum"] for s in state]
        sgd(
            params, _laid_out_like(params, grads), buffers, weight_decay=self.weight_decay, momentum=self.momentum,
            lr=lr, dampening=0.0, nesterov=self.nesterov, maximize=False, has_sparse_grad=False, fused=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015) with bias correction, as torch.optim.Adam computes it."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def update(
        self, params: list[Tensor], grads: list[Tensor], state: list[dict[str, Tensor]], lr: float, updates: int
    ) -> None:
        steps = list(torch.full((len(params),), float(updates), device=params[0].device).unbind())
        adam(
            params, _laid_out_like(params, grads), [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state], [],
            steps, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=self.weight_decay,
            eps=self.eps, maximize=False, fused=True,
        )  # fmt: skip


Projection = Callable[[Shard], None]
"""Moves a group's shard, in place, back into the set that its parameters must stay in. Collective."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are updated alike. `name` prefixes their keys in checkpoints: "weight/layer1.0.conv1.weight"."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    rule: UpdateRule
    lr: float
    projection: Projection | None = field(default=None)
    bf16_gradients: bool = False
    """Whether ranks send each other this group's gradients as bfloat16 (ZeRO 1 and 2 only)."""


class ProjectedOptimizer(torch.optim.Optimizer):
    """Applies each group's rule, then its projection, to whatever tensors the group holds.

    Under ZeRO 1 and 2 DeepSpeed replaces a group's parameters by one flat float32 slice that this rank owns and calls
    `step()` once per group; at stage 0 the group keeps its parameters. The projection gets the group's shard, set by
    `engine.sharding.deepspeed_engine` once the layout is known: the slice, or the flat buffer that the parameters are views of.

        rank 0   [ w0 w1 w2 w | 3 ...      ]   group "weight":       SGD
        rank 1   [            | w3 w4 ... 0]   (0 = padding)
        rank 0   [ s0 s1 s2 s | 3 ...      ]   group "probability":  Adam, then clamp(s - v, 0, 1), v by all-reduce
    """

    def __init__(self, groups: list[ParameterGroup]) -> None:
        super().__init__(
            [
                {"params": list(g.parameters.values()), "name": g.name, "rule": g.rule, "lr": g.lr, "base_lr": g.lr,
                 "projection": g.projection, "updates": 0, "shard": None}
                for g in groups
            ],
            {},
        )  # fmt: skip

    def allocate_state(self) -> None:
        """Make every state tensor now, as zeros: a resume fills them before the first step."""
        for group in self.param_groups:
            for param in group["params"]:
                for name in group["rule"].state_names:
                    if name not in self.state[param]:
                        self.state[param][name] = torch.zeros_like(param, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Collective where a group has a projection: update every group whose parameters have gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            with record_function("optimizer"):
                group["rule"].update(params, grads, [self.state[p] for p in params], group["lr"], group["updates"])
            group["updates"] += 1
            if group["projection"] is not None:
                with record_function("projection"):
                    group["projection"](group["shard"])


def _laid_out_like(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients in the memory order of their parameters: torch's fused kernels take both as plain vectors."""
    pairs = zip(params, grads, strict=True)
    return [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in pairs]
