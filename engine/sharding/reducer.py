"""How do gradients get from every rank's backward pass to the slices: bucket by bucket, while backward goes on.

Parameters lie in buckets (see `slices`); a gradient is copied into its bucket's buffer as soon as autograd has it, and
a full bucket is sent: N bytes per rank, and with the gather of the new parameters 2N, what plain data-parallel training
sends. Buckets leave in a fixed order, so that ranks whose gradients come in another order meet in the same collectives.
Buffers are taken in turns: few are in flight at once.

Sums are made in the order of a tree (see `tree`), of several microbatches too: a bucket keeps a stack of partial sums,
of 4, 2, 1 microbatches after 7 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostmask.engine.sharding.tree import Exchange
from ghostmask.engine.world import World

IN_FLIGHT = 2
"""Buffers of buckets that are being reduced while another is being filled."""


@dataclass
class _Filling:
    """A bucket: numels and offsets of its parameters, share: elements of each rank's part, dtype: that they travel in.

    flat: what is being filled, or (adding) what gradients are added to; sums: (microbatches, their sum) so far.
    """

    numels: list[int]
    share: int
    dtype: torch.dtype
    offsets: list[int] = field(init=False)
    flat: Tensor | None = None
    adding: bool = False
    arrived: set[int] = field(default_factory=set)
    sums: list[tuple[int, Tensor]] = field(default_factory=list)
    exchange: Exchange | None = None
    result: Tensor | None = None

    def __post_init__(self) -> None:
        self.offsets = [sum(self.numels[:i]) for i in range(len(self.numels))]


class BucketReducer:
    """The gradients of some parameters in buckets, of which this rank gets its part of the sum over `world`.

    several: the gradients of several microbatches are added up, in float32, before they are sent.
    """

    def __init__(self, world: World, order: Sequence[int], *, several: bool) -> None:
        """order: the ranks in the order of the parts that they compute."""
        self.world, self.order, self.several = world, order, several
        self._buckets: list[_Filling] = []
        self._leaving: list[int] = []
        self._next = 0
        self._flying: list[int] = []
        self._spare: dict[torch.dtype, list[Tensor]] = {}

    def add_bucket(self, numels: Sequence[int], share: int, dtype: torch.dtype) -> None:
        """One more bucket, number 0, 1, ..."""
        self._buckets.append(_Filling(list(numels), share, dtype))

    def set_leaving(self, order: Sequence[int]) -> None:
        """The buckets in the order in which they leave, the same on every rank."""
        self._leaving = list(order)

    def add(self, bucket: int, position: int, gradient: Tensor, *, sending: bool) -> None:
        """A gradient that autograd has finished; sending: whether this backward pass is the one whose sum leaves."""
        b = self._buckets[bucket]
        if position in b.arrived:  # nobody said that the pass before is over
            self._fill_up(b)
            self._close(b)
        flat = self._open(b)
        view = flat[b.offsets[position] : b.offsets[position] + b.numels[position]].view(gradient.shape)
        if b.adding:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        b.arrived.add(position)
        if sending:
            self._send_ready()

    def end_backward(self, *, sending: bool) -> None:
        """Collective where sending: nothing more comes of this pass; parameters without a gradient count as 0."""
        for number in self._leaving[self._next :]:
            b = self._buckets[number]
            self._fill_up(b)
            if not sending:
                self._close(b)
        if sending:
            self._send_ready()
            for number in list(self._flying):
                self._land(number)
            if self.world.size > 1:
                self._spare.clear()  # what follows needs the memory more than the next backward pass needs the buffers
        self._next = 0

    def result(self, bucket: int) -> Tensor:
        """(share,) float32: this rank's part of the sum over ranks and microbatches; padding is 0."""
        result = self._buckets[bucket].result
        assert result is not None, "step() without a backward pass"
        return result

    def clear(self) -> None:
        """Forget the results: the next backward pass starts from nothing."""
        for b in self._buckets:
            if self.world.size == 1 and b.result is not None:
                self._spare.setdefault(b.result.dtype, []).append(b.result)
            b.result = None

    def _fill_up(self, b: _Filling) -> None:
        """Parameters whose gradient has not come count as 0."""
        flat = self._open(b)
        for position in set(range(len(b.numels))) - b.arrived:
            if not b.adding:
                flat[b.offsets[position] : b.offsets[position] + b.numels[position]] = 0
            b.arrived.add(position)

    def _open(self, b: _Filling) -> Tensor:
        """The buffer that this pass's gradients go into: the sum of one microbatch, if that is what lies on top."""
        if b.flat is None:
            b.adding = bool(b.sums) and b.sums[-1][0] == 1
            b.flat = b.sums.pop()[1] if b.adding else self._buffer(b)
        return b.flat

    def _close(self, b: _Filling) -> Tensor:
        """A pass is over: its sum goes onto the stack, equal ones are added; returns the top."""
        assert b.flat is not None
        count, top = 2 if b.adding else 1, b.flat
        while b.sums and b.sums[-1][0] == count:
            count, below = 2 * count, b.sums.pop()[1]
            below.add_(top)
            self._give_back(top)
            top = below
        b.sums.append((count, top))
        b.flat = None
        b.arrived.clear()
        return top

    def _send_ready(self) -> None:
        while self._next < len(self._leaving):
            number = self._leaving[self._next]
            if len(self._buckets[number].arrived) < len(self._buckets[number].numels):
                return
            self._send(number)
            self._next += 1

    def _send(self, number: int) -> None:
        b = self._buckets[number]
        self._close(b)
        # What is left where the number of microbatches is no power of two.
        while len(b.sums) > 1:
            (_, top), (_, below) = b.sums.pop(), b.sums.pop()
            below.add_(top)
            self._give_back(top)
            b.sums.append((0, below))
        if self.world.size == 1:
            b.result = b.sums.pop()[1].float()
            return
        b.exchange = Exchange(self.world, b.sums[0][1].to(b.dtype), self.order)
        self._flying.append(number)
        if len(self._flying) > IN_FLIGHT:
            self._land(self._flying[0])

    def _land(self, number: int) -> None:
        """The bucket's exchange is over (on CUDA: in the stream's order); its buffer is free."""
        b = self._buckets[number]
        assert b.exchange is not None
        arrived, b.exchange = b.exchange.wait(), None
        self._flying.remove(number)
        self._give_back(b.sums.pop()[1])
        b.result = arrived

    def _buffer(self, b: _Filling) -> Tensor:
        # Sums of several microbatches are made in float32, whatever type they travel in.
        dtype = torch.float32 if self.several else b.dtype
        numel, used = b.share * self.world.size, sum(b.numels)
        spare = self._spare.setdefault(dtype, [])
        fitting = [i for i, t in enumerate(spare) if t.numel() == numel]
        buffer = spare.pop(fitting[0]) if fitting else torch.empty(numel, dtype=dtype, device=self.world.device)
        buffer[used:] = 0
        return buffer

    def _give_back(self, buffer: Tensor) -> None:
        """Keep a few buffers, of a size that buckets have."""
        spare = self._spare.setdefault(buffer.dtype, [])
        if self.several or len(spare) <= IN_FLIGHT:
            spare.append(buffer)
