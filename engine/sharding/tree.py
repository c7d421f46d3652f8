"""How are gradients added up so that the sum does not depend, bit for bit, on the number of ranks?

A float sum depends on its order, and Adam turns the last bit of a gradient that is zero but for rounding into a step of
full size. So parts are added in one order, that of a binary tree over their numbers,

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

of which a rank with 2 or 4 neighbouring parts computes a whole subtree by itself. Ranks do not reduce but exchange
(all-to-all: the same bytes as a reduce-scatter), and each adds up its own elements in the tree's order. Exact where the
numbers of parts and ranks are powers of two; elsewhere, and above MOST ranks, where many small messages would be slower
than the library's reduction, sums agree to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.engine.world import World

MOST = 64
"""Ranks among which sums are made in the tree's order."""


def tree_sum(rows: Sequence[Tensor]) -> Tensor:
    """The sum of equally shaped tensors, neighbours first; may overwrite them."""
    level = list(rows)
    while len(level) > 1:
        pairs = [a.add_(b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


class Exchange:
    """A reduce-scatter under way: this rank's part of the sum of every rank's flat tensor, in the order of places.

    flat: (size * share,) of the type in which it travels, not to be changed before `wait`; order: the ranks in the
    order of their places. The sum is float32.
    """

    def __init__(self, world: World, flat: Tensor, order: Sequence[int]) -> None:
        self._order, self._share = order, flat.numel() // world.size
        self._tree = world.size <= MOST
        shape = flat.numel() if self._tree else self._share
        self._incoming = torch.empty(shape, dtype=flat.dtype, device=flat.device)
        call: Any = dist.all_to_all_single if self._tree else dist.reduce_scatter_tensor
        self._work = call(self._incoming, flat, group=world.group, async_op=True)

    def wait(self) -> Tensor:
        """(share,) float32; on CUDA it is there in the order of the stream."""
        self._work.wait()
        if not self._tree:
            return self._incoming.float()
        rows = self._incoming.view(len(self._order), self._share)
        # A copy: the sum is made in the first row, which would keep all of them alive.
        return tree_sum([rows[rank].float() for rank in self._order]).clone()


def tree_all_reduce(world: World, tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Collective: the sum over the ranks, in the order of their places, of a flat float32 tensor; in place."""
    if world.size == 1:
        return tensor
    if world.size > MOST:
        return world.all_reduce(tensor)
    share = -(-tensor.numel() // world.size)
    padded = tensor.new_zeros(share * world.size)
    padded[: tensor.numel()] = tensor
    own = Exchange(world, padded, order).wait()
    dist.all_gather_into_tensor(padded, own.contiguous(), group=world.group)
    return tensor.copy_(padded[: tensor.numel()])
