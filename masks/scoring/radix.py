"""Which elements are the largest of each of several groups, so many of each: a radix search over all ranks' elements.

Every rank holds some elements of each group. A score's *key* is an integer, ordered as the scores are, and the search
goes down its bits: a histogram of the leading ones, added up over the ranks, says in which bin the threshold of each
group lies; the next round looks into that bin only. One group on CPUs: 16 bits a round, so 2 all-reduces for float32;
else 11 bits a round and all groups' histograms in one all-reduce, so 3. Counts are integers, and equal keys are told
apart by a hash of the element's index, in a second search of the same kind: the same elements on any number of ranks.

On the CPU numba counts, and the second search is left out where there is nothing to tell apart. On CUDA Triton counts
(elsewhere torch), and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostmask.engine.compiled import kernels_on, pieces_in, split_over_threads
from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.world import World

CHUNK = 1 << 22
"""Elements that torch handles at once: bounds the extra memory to a few times 4 M int64."""
SMALLEST_RANGE = 1 << 16
"""Elements worth a thread of their own."""
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Types that hold a score's bits."""
KERNELS = "ghostmask.masks.kernels.radix"


@dataclass(frozen=True)
class Piece:
    """Elements start .. start + numel of this rank, all of them of one group, by its number."""

    group: int
    start: int
    numel: int


def largest_keys(
    keys: Tensor, pieces: Sequence[Piece], counts: Sequence[int], ties: Callable[[Tensor | None], Tensor], world: World
) -> Tensor:
    """Collective: this rank's bools, (n,): of each group g, the counts[g] elements of all ranks with the largest keys.

    keys: (n,) int32 or int64; pieces: in order, they cover all elements; ties: places of this rank, None = all, ->
    int64, different for all elements: the larger one of equal keys stays. A group must have as many elements as it is
    asked for.
    """
    search = _Search(pieces, len(counts), world)
    wanted = torch.tensor(counts).to(keys.device, non_blocking=True)
    thresholds, left, tied = search.run(keys, wanted)
    host = on_host(keys.device)
    if host and bool((left == tied).all()):
        return search.compared(keys, thresholds, "ge")
    mask = search.compared(keys, thresholds, "gt")
    equal = search.compared(keys, thresholds, "eq")
    if host:
        places = equal.nonzero().squeeze(1)
        search, order = _Search(_among(pieces, places), len(counts), world), ties(places)
        mask[places] = search.compared(order, search.run(order, left)[0], "ge")
        return mask
    order = torch.where(equal, ties(None), torch.iinfo(torch.int64).min)
    return mask | (equal & search.compared(order, search.run(order, left)[0], "ge"))


def score_keys(scores: Tensor, among: Tensor | None, world: World, *, wait: bool) -> Tensor:
    """Collective: (n,) int32 or int64 keys of float32 or float64 scores; -0.0 equals 0.0, infinities are scores.

    among: bools; all others get the lowest key. A nan stops the run on every rank (RunStopped), but where nobody may
    wait for the device: there it has the highest key, so that it is kept and the next loss stops the run.
    """
    kernels = kernels_on(scores.device, KERNELS) if on_host(scores.device) else None
    keys, nans = _compiled_keys(kernels, scores, among) if kernels else _torch_keys(scores, among)
    if wait or on_host(scores.device):
        bad, total = world.all_reduce(torch.stack([nans, torch.full_like(nans, len(scores))])).tolist()
        if bad:
            raise RunStopped(f"{bad} of {total} scores are nan", EXIT_NON_FINITE)
    return keys


def on_host(device: torch.device) -> bool:
    """Whether what is computed there can be looked at without waiting for it."""
    return device.type == "cpu"


def rounds(bits: int, width: int) -> list[tuple[int, int]]:
    """(bits below a bin's, bins) of each round for keys of so many bits, `width` of them a round."""
    shifts = [*range(bits - width, 0, -width), 0]
    return [(s, 1 << min(width, above - s)) for above, s in zip([bits, *shifts], shifts, strict=False)]


class _Search:
    """The groups' elements on this rank, and the search for each group's threshold."""

    def __init__(self, pieces: Sequence[Piece], groups: int, world: World) -> None:
        self.pieces, self.groups, self.world = [p for p in pieces if p.numel], groups, world
        self.numbers: Tensor | None = None
        """(n,) int64 on a device: the group of each element; None where there is one group."""
        if groups > 1 and not on_host(world.device):
            shape = torch.tensor([[p.group, p.numel] for p in self.pieces] or [[0, 0]])
            owners, numels = shape.to(world.device, non_blocking=True).unbind(1)
            total = sum(p.numel for p in self.pieces)
            self.numbers = owners.repeat_interleave(numels, output_size=total)

    def run(self, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collective: (groups,) int64 each: the counts[g]-th largest key, how many equal to it are among these, and how
        many equal to it there are."""
        width = 16 if self.groups == 1 and on_host(keys.device) else 11
        left, found, base = counts, counts, torch.zeros_like(counts)
        for shift, bins in rounds(torch.iinfo(keys.dtype).bits, width):
            base = torch.full_like(counts, -bins // 2) if found is counts else base * bins
            table = self.world.all_reduce(self._table(keys, base, shift, bins))
            from_top = table.flip(1).cumsum(1)
            place = (from_top < left[:, None]).sum(1, keepdim=True).clamp_(max=bins - 1)
            found = table.flip(1).gather(1, place)[:, 0]
            left = left - from_top.gather(1, place)[:, 0] + found
            base = base + bins - 1 - place[:, 0]
        return base, left, found

    def compared(self, keys: Tensor, thresholds: Tensor, how: str) -> Tensor:
        """(n,) bool: each key against the threshold of its group; how: "gt", "ge" or "eq"."""
        compare: Callable[..., Tensor] = getattr(torch, how)
        if self.groups == 1:
            return compare(keys, thresholds.to(keys.dtype))
        if self.numbers is not None:
            return compare(keys, thresholds.to(keys.dtype)[self.numbers])
        out = torch.zeros(keys.shape, dtype=torch.bool)
        limits = thresholds.tolist()
        for p in self.pieces:
            own = slice(p.start, p.start + p.numel)
            compare(keys[own], limits[p.group], out=out[own])
        return out

    def _table(self, keys: Tensor, base: Tensor, shift: int, bins: int) -> Tensor:
        """(groups, bins) int64 on the keys' device: of each group, the keys with key >> shift = base + j."""
        kernels = kernels_on(keys.device, KERNELS)
        if not kernels or not len(keys):
            return self._torch_table(keys, base, shift, bins)
        if not on_host(keys.device):
            table: Tensor = kernels.count(keys, self.numbers, base, shift, bins)
            return table
        array, bases, lengths = keys.numpy(), base.tolist(), [p.numel for p in self.pieces]

        def work(first: int, end: int) -> Tensor:
            table = torch.zeros(self.groups, bins, dtype=torch.int64)
            rows = table.numpy()
            for number, begin, stop in pieces_in(lengths, first, end):
                p = self.pieces[number]
                kernels.count(array, p.start + begin, p.start + stop, bases[p.group], shift, bins, rows[p.group])
            return table

        parts = split_over_threads(work, sum(lengths), SMALLEST_RANGE)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def _torch_table(self, keys: Tensor, base: Tensor, shift: int, bins: int) -> Tensor:
        table = torch.zeros(self.groups * bins, dtype=torch.int64, device=keys.device)
        for own, numbers in self._chunks(keys):
            place = (own.long() >> shift) - base[numbers]
            inside = (place >= 0) & (place < bins)
            # What lies outside adds 0 here and there: a million additions to one address would wait for each other.
            spread = torch.arange(len(own), device=keys.device) % len(table)
            table.scatter_add_(0, torch.where(inside, numbers * bins + place, spread), inside.long())
        return table.view(self.groups, bins)

    def _chunks(self, keys: Tensor) -> Iterator[tuple[Tensor, Any]]:
        """The keys in pieces of bounded size, each with the number of its group, or the numbers of its elements."""
        if self.numbers is not None:
            yield from zip(torch.split(keys, CHUNK), torch.split(self.numbers, CHUNK), strict=True)
            return
        numbers = torch.arange(self.groups, device=keys.device).unbind()
        for p in self.pieces:
            for own in torch.split(keys[p.start : p.start + p.numel], CHUNK):
                yield own, numbers[p.group]


def _among(pieces: Sequence[Piece], places: Tensor) -> list[Piece]:
    """The pieces of the elements at these places, which are in order, laid end to end."""
    edges = torch.searchsorted(places, torch.tensor([[p.start, p.start + p.numel] for p in pieces])).tolist()
    return [Piece(p.group, low, high - low) for p, (low, high) in zip(pieces, edges, strict=True)]


def _compiled_keys(kernels: Any, scores: Tensor, among: Tensor | None) -> tuple[Tensor, Tensor]:
    integer = INTEGERS[scores.dtype]
    limits, infinity = torch.iinfo(integer), int(torch.tensor(torch.inf, dtype=scores.dtype).view(integer))
    if among is None and len(scores):
        least, most = scores.view(integer).aminmax()
        if least >= 0 and most <= infinity:  # magnitudes: their bits are their keys
            return scores.view(integer), torch.tensor(0)
    keys = torch.empty(scores.shape, dtype=integer)
    bits, out = scores.view(integer).numpy(), keys.numpy()
    which = torch.zeros(0, dtype=torch.bool) if among is None else among

    def work(first: int, end: int) -> int:
        nans: int = kernels.keys(bits, which.numpy(), first, end, limits.max, infinity, limits.min, out)
        return nans

    return keys, torch.tensor(sum(split_over_threads(work, len(scores), SMALLEST_RANGE)))


def _torch_keys(scores: Tensor, among: Tensor | None) -> tuple[Tensor, Tensor]:
    integer = INTEGERS[scores.dtype]
    limits = torch.iinfo(integer)
    # Adding 0.0 turns -0.0 into 0.0. Negative floats order in reverse: all bits below their sign are flipped.
    bits, nan = (scores + 0.0).view(integer), scores.isnan()
    keys = torch.where(nan, limits.max, torch.where(bits < 0, bits ^ limits.max, bits))
    return keys if among is None else torch.where(among, keys, limits.min), nan.sum()
