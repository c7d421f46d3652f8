"""How do gradients get from every rank's backward pass to the slices: bucket by bucket, while backward goes on.

Parameters lie in buckets (see `slices`); a gradient is copied into its bucket's buffer as soon as autograd has it, and a
full bucket is reduce-scattered: N bytes per rank, and with the gather of the new parameters 2N, what plain
data-parallel training sends. Buckets leave in a fixed order, so that ranks whose gradients come in another order meet
in the same collectives. Buffers are taken in turns: few are in flight at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.engine.world import World

IN_FLIGHT = 2
"""Buffers of buckets that are being reduced while another is being filled."""


@dataclass
class _Filling:
    """A bucket: numels and offsets of its parameters, share: elements of each rank's part, dtype: that they travel in."""

    numels: list[int]
    share: int
    dtype: torch.dtype
    offsets: list[int] = field(init=False)
    buffer: Tensor | None = None
    flat: Tensor | None = None
    arrived: set[int] = field(default_factory=set)
    filled: set[int] = field(default_factory=set)
    work: Any = None
    incoming: Tensor | None = None
    result: Tensor | None = None

    def __post_init__(self) -> None:
        self.offsets = [sum(self.numels[:i]) for i in range(len(self.numels))]


class BucketReducer:
    """The gradients of some parameters in buckets, of which this rank gets its part of the sum over `world`.

    several: the gradients of several microbatches are added up, in float32: before they are sent, or with send_each
    after it (then no more than the slices and some buffers are held, but every microbatch is sent).
    """

    def __init__(self, world: World, *, several: bool, send_each: bool) -> None:
        self.world, self.several = world, several
        # One rank sends nothing: its sums are made in the buckets themselves.
        self.send_each = send_each and world.size > 1
        self._buckets: list[_Filling] = []
        self._order: list[int] = []
        self._next = 0
        self._flying: list[int] = []
        self._spare: dict[torch.dtype, list[Tensor]] = {}

    def add_bucket(self, numels: Sequence[int], share: int, dtype: torch.dtype) -> None:
        """One more bucket, number 0, 1, ..."""
        self._buckets.append(_Filling(list(numels), share, dtype))

    def set_order(self, order: Sequence[int]) -> None:
        """The buckets in the order in which they leave, the same on every rank."""
        self._order = list(order)

    def add(self, bucket: int, position: int, gradient: Tensor, *, sending: bool) -> None:
        """A gradient that autograd has finished; sending: whether this backward pass is the one whose sum leaves."""
        b = self._buckets[bucket]
        if b.flat is None:
            self._take_buffer(b)
        assert b.flat is not None
        view = b.flat[b.offsets[position] : b.offsets[position] + b.numels[position]].view(gradient.shape)
        if position in b.filled:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        b.filled.add(position)
        b.arrived.add(position)
        if sending:
            self._send_ready()

    def end_backward(self, *, sending: bool) -> None:
        """Collective where sending: nothing more comes of this pass; parameters without a gradient count as 0."""
        if sending:
            for number in self._order[self._next :]:
                b = self._buckets[number]
                if b.flat is None:
                    self._take_buffer(b)
                assert b.flat is not None
                for position in set(range(len(b.numels))) - b.filled:
                    b.flat[b.offsets[position] : b.offsets[position] + b.numels[position]] = 0
                b.arrived.update(range(len(b.numels)))
            self._send_ready()
            for number in list(self._flying):
                self._land(number)
        for b in self._buckets:
            b.arrived.clear()
        self._next = 0

    def result(self, bucket: int) -> Tensor:
        """(share,): this rank's part of the sum over ranks and microbatches, in a type of its own; padding is 0."""
        result = self._buckets[bucket].result
        assert result is not None, "step() without a backward pass"
        return result

    def clear(self) -> None:
        """Forget the results: the next backward pass starts from nothing."""
        for b in self._buckets:
            b.result = None
            self._give_back(b)

    def _send_ready(self) -> None:
        while self._next < len(self._order):
            number = self._order[self._next]
            if len(self._buckets[number].arrived) < len(self._buckets[number].numels):
                return
            self._send(number)
            self._next += 1

    def _send(self, number: int) -> None:
        b = self._buckets[number]
        assert b.flat is not None
        if self.world.size == 1:
            b.incoming = b.flat
            self._land(number)
            return
        outgoing = b.flat.to(b.dtype)
        b.incoming = torch.empty(b.share, dtype=b.dtype, device=outgoing.device)
        b.work = dist.reduce_scatter_tensor(b.incoming, outgoing, group=self.world.group, async_op=True)
        self._flying.append(number)
        if not (self.several and not self.send_each) and len(self._flying) > IN_FLIGHT:
            self._land(self._flying[0])

    def _land(self, number: int) -> None:
        """The bucket's reduction is over (on CUDA: in the stream's order); its buffer is free."""
        b = self._buckets[number]
        if b.work is not None:
            b.work.wait()
            self._flying.remove(number)
        arrived, b.work, b.incoming = b.incoming, None, None
        assert arrived is not None
        if b.result is None:
            b.result = arrived.float() if self.several and self.send_each else arrived
        else:
            b.result += arrived
        if arrived is not b.flat or b.result is not b.flat:
            self._give_back(b)
        b.filled.clear()

    def _take_buffer(self, b: _Filling) -> None:
        # Sums of several microbatches are made in float32, whatever type they travel in.
        dtype = torch.float32 if self.several and not self.send_each else b.dtype
        numel, used = b.share * self.world.size, sum(b.numels)
        spare = self._spare.setdefault(dtype, [])
        fits = [i for i, t in enumerate(spare) if t.numel() >= numel]
        if fits:
            buffer = spare.pop(min(fits, key=lambda i: spare[i].numel()))
        else:
            buffer = torch.empty(numel, dtype=dtype, device=self.world.device)
        b.buffer, b.flat = buffer, buffer[:numel]
        b.flat[used:] = 0

    def _give_back(self, b: _Filling) -> None:
        if b.buffer is not None:
            self._spare[b.buffer.dtype].append(b.buffer)
        b.buffer = b.flat = None
        b.filled.clear()
