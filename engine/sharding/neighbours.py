"""What stands next to a slice's elements in the group, on whatever rank? For what looks at a few neighbours at once."""

from __future__ import annotations

from torch import Tensor

from ghostmask.engine.sharding.slices import Run, Slice


def with_neighbours(part: Slice, values: Tensor, reach: int) -> list[tuple[Run, Tensor, int]]:
    """Collective: for each run of this slice that is not empty: the run, the values, (m,), of its elements and of up to
    `reach` before and behind them, and the index in the group of the first of these.

    values: (n,) of this slice. Neighbours are those of the same bucket: a parameter never lies in two.
    """
    if part.world.size == 1:
        return [(run, own, run.first) for run, own in part.views(values)]
    edges = values.new_zeros(len(part.runs), 2, reach)
    for edge, run in zip(edges, part.runs, strict=True):
        known, end = min(reach, run.numel), run.start + run.numel
        edge[0, :known] = values[run.start : run.start + known]
        edge[1, reach - known :] = values[end - known : end]
    edges = part.world.all_gather(edges)
    found = []
    for number, (run, bucket) in enumerate(zip(part.runs, part.layout.buckets, strict=True)):
        if not run.numel:
            continue
        low = max(bucket.first, run.first - reach)
        high = min(bucket.first + bucket.numel, run.first + run.numel + reach)
        wide = values.new_empty(high - low)
        for rank in range(part.world.size):
            other = part.layout.runs(rank)[number]
            known, end = min(reach, other.numel), other.first + other.numel
            _overlay(wide, low, edges[rank, number, 0, :known], other.first)
            _overlay(wide, low, edges[rank, number, 1, reach - known :], end - known)
        _overlay(wide, low, values[run.start : run.start + run.numel], run.first)
        found.append((run, wide, low))
    return found


def _overlay(wide: Tensor, low: int, piece: Tensor, first: int) -> None:
    """Put a piece that begins at index `first` where it lies in what begins at index `low`, as far as it does."""
    begin, end = max(first, low), min(first + len(piece), low + len(wide))
    if begin < end:
        wide[begin - low : end - low] = piece[begin - first : end - first]
