"""rigl: a sparse network whose smallest weights move to where the gradient of the dense network is largest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.regrowing import Regrowing, RegrowingMethod, Regrown


@dataclass(frozen=True)
class Settings(Regrowing):
    """rigl."""


class ByGradient(Regrown):
    """Grows where |dL/d(theta)| is largest, theta = 0 included: the mean over all images of the step, of all ranks.

    With ToST it is that of the network that trains then, ghosts and soft neurons and all; LRsI scales a layer as a
    whole, and only weights of one layer are compared.
    """

    growing = True

    def promise(self, gradient: Tensor, part: Slice, updates: int) -> Tensor:
        return gradient.abs()


class RigL(RegrowingMethod):
    """RigL (Evci et al. 2020): every mask.update_every steps the smallest weights of each layer move to where the loss
    would fall fastest; at the same density throughout."""

    Settings = Settings
    paper = 'Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", https://arxiv.org/abs/1911.11134'
    aliases = ("dst", "dynamic")
    form = ByGradient
