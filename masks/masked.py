"""Weights under a mask, as reparametrizations: what all methods share, and a mask that stays as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ghostmask.engine.errors import InputError
from ghostmask.engine.sharding.average import delivered
from ghostmask.engine.sharding.optimizer import ShardedOptimizer
from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Slice

PRUNABLE = "prunable"
"""The parameter group of the weights that a mask is laid on."""


class Masked(Reparametrization, ABC):
    """Weights w (state "weight") of which a mask says which stay; delivered as w where it is True and 0 elsewhere.

    The mask is checked (see `checking`) after the updates that decide it, at every report and at the end of phases.
    """

    costly: ClassVar[bool] = False
    """Whether `mask` is a search that training does not need: it is then looked at once per epoch, not at reports."""

    def decides(self, updates: int) -> bool:
        """Whether update number `updates`, counted from 1, decided the mask anew; False also where each one does."""
        return False

    def due(self, part: Slice) -> Sequence[int] | None:
        """How many weights `mask` must keep now: (one number) in all, or of each layer; None where that is a result."""
        return None

    @abstractmethod
    def mask(self, state: State, part: Slice) -> Tensor:
        """(n,) bool: the mask with which the network would be delivered now. Collective."""

    def evaluation_weights(self, state: State, part: Slice) -> Tensor:
        return torch.where(self.mask(state, part), state["weight"], 0.0)


class FixedMask(Masked):
    """theta = w m with a boolean mask m in the state; what is pruned gets no gradient, only weight decay."""

    def __init__(
        self, rule: UpdateRule, masks: Mapping[str, Tensor] | None = None, kept: Sequence[int] | None = None
    ) -> None:
        """masks: bool tensors by parameter name, equal on all ranks; None: all True, until a checkpoint says
        otherwise. kept: see `due`."""
        super().__init__({"weight": rule})
        self._masks, self.kept = masks, kept

    def start(self, weight: Tensor, part: Slice) -> State:
        masks, self._masks = self._masks, None
        if masks is None:
            return {"weight": weight, "mask": torch.ones_like(weight, dtype=torch.bool)}
        for name, shape in part.layout.shapes.items():
            if name not in masks or masks[name].dtype != torch.bool or masks[name].shape != shape:
                raise InputError(f"there is no mask for {name}: give a bool tensor of shape {tuple(shape)}")
        return {"weight": weight, "mask": part.cut(masks).to(weight.device)}

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        return state["weight"] * state["mask"]

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        return {"weight": gradient.mul_(state["mask"])}

    def counted(self, name: str, state: State) -> Tensor:
        return torch.where(state["mask"], state[name], 0.0)

    def due(self, part: Slice) -> Sequence[int] | None:
        return self.kept

    def mask(self, state: State, part: Slice) -> Tensor:
        return state["mask"]


class ChangingMask(FixedMask):
    """A mask that changes while it trains: what it prunes becomes 0, its momentum too, and returns from there."""

    def start(self, weight: Tensor, part: Slice) -> State:
        state = super().start(weight, part)
        state["weight"].masked_fill_(~state["mask"], 0.0)
        return state

    def lay(self, state: State, mask: Tensor) -> None:
        """Train on under another mask, (n,) bool."""
        state["mask"].copy_(mask)
        for name in ("weight", *(f"weight.{buffer}" for buffer in self.rules["weight"].buffers)):
            state[name].masked_fill_(~mask, 0.0)


@torch.no_grad()
def present_masks(optimizer: ShardedOptimizer) -> dict[str, Tensor]:
    """Collective: the masks with which the network would be delivered now, whole, by weight name; empty if dense."""
    for group, state, part in zip(optimizer.groups, optimizer.states, optimizer.slices, strict=True):
        if isinstance(group.reparametrization, Masked):
            return part.gathered(group.reparametrization.mask(delivered(state), part))
    return {}


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Kept weights / weights of boolean masks; 1 without masks."""
    total = sum(m.numel() for m in masks.values())
    return sum(int(m.sum()) for m in masks.values()) / total if total else 1.0
