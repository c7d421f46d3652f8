"""Which elements of which parameters does this rank own: a Layout for all ranks, and the Slice of one of them.

A group's parameters lie end to end, in the order of the group; an element's place in that row is its *index*, the same
for every number of ranks. The row is cut into buckets, and each bucket into equal parts, one per rank:

                      bucket 0                       bucket 1
    index   0 1 2 3 | 4 5 6 7 | 8 9      10 11 12 | 13 14 15 | 16 17
            rank 0    rank 1    rank 2   rank 0     rank 1     rank 2      rank 0's slice: two runs, 0..3 and 10..12

So a bucket can be reduced as soon as backward has filled it, and every rank gets its share of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.world import World


@dataclass(frozen=True)
class Segment:
    """The elements of one parameter inside a slice.

    name: the parameter's; layer: its number in the group; start: where they begin in the slice; numel: how many;
    offset: where they begin in the flattened parameter.
    """

    name: str
    layer: int
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Run:
    """Elements of a slice whose indices follow one another: start: in the slice; first: index of the first one."""

    start: int
    numel: int
    first: int


@dataclass(frozen=True)
class Bucket:
    """Neighbouring parameters, number `first_layer` and on, of `numel` elements from index `first` on; `share`:
    elements of each rank's part, the last parts may be shorter."""

    first_layer: int
    layers: int
    first: int
    numel: int
    share: int


class Layout:
    """How a group's parameters are shared out. shapes: by name, in the group's order; one bucket if none are given."""

    def __init__(self, shapes: Mapping[str, torch.Size], ranks: int, bucket_elements: int = 0, align: int = 1) -> None:
        """bucket_elements: a bucket is closed when it holds so many (0: never); align: shares are multiples of it."""
        self.shapes = dict(shapes)
        self.numels = [shape.numel() for shape in shapes.values()]
        self.total, self.ranks = sum(self.numels), ranks
        self.buckets: list[Bucket] = []
        first_layer, first, filled = 0, 0, 0
        for number, numel in enumerate(self.numels):
            filled += numel
            last = number == len(self.numels) - 1
            if last or (bucket_elements and filled >= bucket_elements):
                share = -(-filled // (ranks * align)) * align
                self.buckets.append(Bucket(first_layer, number + 1 - first_layer, first, filled, share))
                first_layer, first, filled = number + 1, first + filled, 0

    def runs(self, rank: int) -> tuple[Run, ...]:
        """The runs of a rank's slice, one per bucket; some may be empty."""
        runs, start = [], 0
        for bucket in self.buckets:
            low = min(rank * bucket.share, bucket.numel)
            numel = min(low + bucket.share, bucket.numel) - low
            runs.append(Run(start, numel, bucket.first + low))
            start += numel
        return tuple(runs)

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """What of which parameter lies in a rank's slice, in order."""
        found = []
        for run in self.runs(rank):
            begin = 0
            for layer, (name, numel) in enumerate(zip(self.shapes, self.numels, strict=True)):
                low, high = max(run.first, begin), min(run.first + run.numel, begin + numel)
                if low < high:
                    found.append(Segment(name, layer, run.start + low - run.first, high - low, low - begin))
                begin += numel
        return tuple(found)


class Slice:
    """This rank's elements of a group, and what is computed over all ranks' elements together.

    world: the ranks that share the group; of size 1 where this rank holds all of it. Tensors that belong to a slice
    are 1-D, (numel,), on world.device.
    """

    def __init__(self, layout: Layout, world: World) -> None:
        assert layout.ranks == world.size
        self.layout, self.world, self.total = layout, world, layout.total
        self.runs, self.segments = layout.runs(world.rank), layout.segments(world.rank)
        self.numel = sum(run.numel for run in self.runs)

    @classmethod
    def even(cls, parameters: Mapping[str, Tensor], world: World) -> Slice:
        """The parameters shared out evenly in one run per rank."""
        return cls(Layout({name: p.shape for name, p in parameters.items()}, world.size), world)

    @property
    def names(self) -> tuple[str, ...]:
        """The group's parameters, on whatever rank."""
        return tuple(self.layout.shapes)

    def indices(self, places: Tensor | None = None) -> Tensor:
        """(numel,) int64: the index of each element in the group; with places in the slice, (m,) int64: of those."""
        device = self.world.device
        if places is not None:
            starts, firsts = torch.tensor([[r.start, r.first] for r in self.runs], device=device).T.contiguous()
            found: Tensor = places + (firsts - starts)[torch.searchsorted(starts, places, right=True) - 1]
            return found
        parts = [torch.arange(run.first, run.first + run.numel, device=device) for run in self.runs]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)

    def views(self, tensor: Tensor) -> Iterator[tuple[Run, Tensor]]:
        """Each run that is not empty, and its elements of a tensor of this slice."""
        for run in self.runs:
            if run.numel:
                yield run, tensor[run.start : run.start + run.numel]

    def cut(self, whole: Mapping[str, Tensor]) -> Tensor:
        """This slice's elements, (numel,), of whole tensors shaped like the parameters and equal on every rank."""
        parts = [whole[s.name].detach().reshape(-1)[s.offset : s.offset + s.numel] for s in self.segments]
        if not parts:
            return next(iter(whole.values())).new_zeros(0)
        return torch.cat(parts)

    def gathered(self, tensor: Tensor) -> dict[str, Tensor]:
        """Collective: the whole tensors by parameter name, equal on every rank, of which this slice holds `tensor`."""
        whole = {n: tensor.new_empty(shape.numel()) for n, shape in self.layout.shapes.items()}
        longest = max(sum(run.numel for run in self.layout.runs(rank)) for rank in range(self.world.size))
        # Bytes: gloo gathers no booleans.
        boolean = tensor.dtype == torch.bool
        padded = torch.zeros(longest, dtype=torch.uint8 if boolean else tensor.dtype, device=tensor.device)
        padded[: self.numel] = tensor
        for rank, row in enumerate(self.world.all_gather(padded)):
            for s in self.layout.segments(rank):
                whole[s.name][s.offset : s.offset + s.numel] = row[s.start : s.start + s.numel]
        return {n: flat.view(self.layout.shapes[n]) for n, flat in whole.items()}

    def sum(self, tensor: Tensor) -> Tensor:
        """Collective: the sum over all ranks' elements; int64 of booleans and integers, float64 otherwise."""
        exact = torch.float64 if tensor.is_floating_point() else torch.int64
        return self.world.all_reduce(tensor.sum(dtype=exact))

    def layer_sums(self, tensor: Tensor) -> Tensor:
        """Collective: (layers,) the sum over each parameter's elements on all ranks; types as in `sum`."""
        exact = torch.float64 if tensor.is_floating_point() else torch.int64
        sums = torch.zeros(len(self.layout.shapes), dtype=exact, device=self.world.device)
        for s in self.segments:
            sums[s.layer] += tensor[s.start : s.start + s.numel].sum(dtype=exact)
        return self.world.all_reduce(sums)

    def summed(self, tensors: Iterable[Tensor]) -> Tensor:
        """Collective: this slice of the sum over ranks of tensors shaped like the parameters; for `even` slices."""
        (bucket,) = self.layout.buckets
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        padding = flat.new_zeros(bucket.share * self.world.size - self.total)
        return self.world.reduce_scatter(torch.cat([flat, padding]))[: self.numel]


def bucketed(names: Sequence[str], layout: Layout) -> list[list[str]]:
    """The parameters' names, bucket by bucket."""
    return [list(names[b.first_layer : b.first_layer + b.layers]) for b in layout.buckets]
