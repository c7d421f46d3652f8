"""Which elements of which parameters this rank owns: one Shard per parameter group, whatever the ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Segment:
    """The run of elements of one parameter inside a shard.

    start: where it begins in the shard's tensor; numel: its length; offset: where it begins in the flattened
    parameter; full_numel: elements of the whole parameter.
    """

    name: str
    start: int
    numel: int
    offset: int
    full_numel: int


@dataclass(frozen=True)
class Shard:
    """The float32 elements of a parameter group that this rank updates.

    tensor: (n,) float32, this rank's slice of the group's parameters laid end to end, with zeros as padding at the end;
    first_index: position of tensor[0] in that whole; segments: what lies where (padding is in none of them);
    replicated: every rank holds the whole (ZeRO stage 0, or one rank), so sums over it must not be reduced.
    """

    tensor: Tensor
    first_index: int
    segments: tuple[Segment, ...]
    replicated: bool

    @torch.no_grad()
    def copy_from(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the elements of the whole parameters that lie in this shard."""
        for s in self.segments:
            whole = parameters[s.name].reshape(-1)
            self.tensor[s.start : s.start + s.numel].copy_(whole[s.offset : s.offset + s.numel])


def ranges_within(sizes: Iterable[int], first: int, end: int) -> Iterator[tuple[int, int]]:
    """For each of several vectors laid end to end, its elements [low, high) among the whole's [first, end).

    low == high where there are none.
    """
    start = 0
    for size in sizes:
        low = min(max(first - start, 0), size)
        yield low, max(low, min(end - start, size))
        start += size


def flatten_parameters(parameters: Mapping[str, nn.Parameter]) -> Shard:
    """Lay the parameters end to end in one new buffer, make each a view of it, and return the buffer as a Shard.

    What ZeRO does to a group, for stage 0: projections then see one tensor at every stage. A parameter keeps its shape
    and becomes contiguous.
    """
    numel = sum(p.numel() for p in parameters.values())
    first = next(iter(parameters.values()))
    flat = torch.empty(numel, dtype=torch.float32, device=first.device)
    segments, start = [], 0
    for name, param in parameters.items():
        view = flat[start : start + param.numel()].view(param.shape)
        view.copy_(param.data)
        param.data = view
        segments.append(Segment(name, start, param.numel(), 0, param.numel()))
        start += param.numel()
    return Shard(flat, 0, tuple(segments), replicated=True)


def zero_shard(parameters: Mapping[str, nn.Parameter], partition: Tensor, rank: int, size: int) -> Shard:
    """The Shard of a group under DeepSpeed ZeRO 1 or 2, read from the `_hp_mapping` that it hangs on parameters.

    partition: the flat float32 slice of this rank (equal length on every rank).
    """
    segments = []
    for name, param in parameters.items():
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is None:  # none of this parameter lies in this rank's slice
            continue
        here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        segments.append(Segment(name, here.start, here.numel, there.start, param.numel()))
    ordered = tuple(sorted(segments, key=lambda s: s.start))
    return Shard(partition.detach(), rank * partition.numel(), ordered, replicated=size == 1)
