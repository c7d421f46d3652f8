"""A world that counts its all-reduces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ghostmask.engine.world import World


@dataclass(frozen=True)
class CountingWorld(World):
    """calls: the shape of what each one added up."""

    calls: list[torch.Size] = field(default_factory=list)

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append(tensor.shape)
        return super().all_reduce(tensor, *args, **kwargs)
