"""Which weights of a network have the largest scores: over all layers, in each layer, or with a few of each kept safe.

Scores lie in slices (`engine.sharding.slices`): each rank scores and decides its own elements, and over all ranks
exactly as many are kept as are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.engine.compiled import load_kernels, split_over_threads
from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped, bad_value
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.world import World

BINS = 1 << 16
"""Bins of a pass: 16 bits of the scores' integer image, from the upper ones down."""
CHUNK = 1 << 22
"""Elements that torch handles at once: bounds the extra memory to a few times 4 M int64."""
SMALLEST_RANGE = 1 << 16
"""Elements worth a thread of their own."""
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Types that hold a score's bits."""


@dataclass(frozen=True)
class Budget:
    """How many weights stay, and where.

    density: in (0, 1], round(density n) weights; constraint: "global" (of the whole network) or "layerwise" (of each
    layer); min_per_layer: with "global", that many of each layer's largest (all of a smaller layer) stay before the
    others compete; seed: decides between equal scores, by a hash of the weight's index.
    """

    density: float
    constraint: str = "global"
    min_per_layer: int = 0
    seed: int = 0


def largest(part: Slice, scores: Tensor, budget: Budget, among: Tensor | None = None) -> Tensor:
    """Collective: this rank's bools, (n,): the largest scores that the budget allows, exactly as many on all ranks.

    scores: (n,), larger = kept; among: bools, the only ones that may be kept (of each layer at least as many as are
    asked for). Raises InputError where min_per_layer is more than the budget.
    """
    sizes, mask = part.layout.numels, torch.zeros_like(scores, dtype=torch.bool)
    kept = kept_count(budget.density, part.total)
    if budget.constraint == "layerwise":
        of_layers = [kept_count(budget.density, size) for size in sizes]
    else:
        of_layers = protected_counts(sizes, budget.min_per_layer, budget.density) if budget.min_per_layer else []
    for number, count in enumerate(of_layers):
        ranges = [torch.arange(s.start, s.start + s.numel) for s in part.segments if s.layer == number]
        places = torch.cat([torch.zeros(0, dtype=torch.int64), *ranges]).to(scores.device)
        _keep(mask, part, scores, places if among is None else places[among[places]], count, budget.seed)
    if budget.constraint == "layerwise":
        return mask
    if of_layers:
        among = ~mask if among is None else among & ~mask
    everywhere = None if among is None else among.nonzero().squeeze(1)
    _keep(mask, part, scores, everywhere, kept - sum(of_layers), budget.seed)
    return mask


def empty_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers whose mask keeps nothing: no signal passes them."""
    return [name for name, mask in masks.items() if not mask.any()]


def kept_count(density: float, prunable: int) -> int:
    """Number of weights kept of `prunable` at `density` in (0, 1]: round(density * prunable), at least 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density = {density}: give a number in (0, 1]")
    return max(1, round(density * prunable))


def protected_counts(sizes: Sequence[int], min_per_layer: int, density: float) -> list[int]:
    """How many weights of each layer min_per_layer saves; InputError where these are more than the density keeps."""
    counts, kept = [min(min_per_layer, size) for size in sizes], kept_count(density, sum(sizes))
    if sum(counts) > kept:
        fix = f"{len(sizes)} layers need {sum(counts)} weights, mask.density = {density:g} keeps {kept}"
        raise bad_value("mask.min_per_layer", min_per_layer, f"{fix}; lower the one or raise the other")
    return counts


def topk_shard(scores: Tensor, kept: int, world: World, tie_order: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Collective: the mask of this rank's shard of the scores: exactly `kept` ones over all ranks, the largest scores.

    scores: (n,) this rank's share of all scores; n may differ and be 0, the type is the same on every rank; float32 or
    float64, other types are rounded to float32. No score leaves its rank: 16 bits per pass, the ranks' histograms are
    added up (512 KB). Of equal scores at the threshold those that come last in tie_order stay, which gives positions of
    this shard, (m,) int64, numbers (m,) float64; without it, or where these are equal too, the lower ranks' first ones.
    -0.0 equals 0.0, and infinities are ordinary scores. Raises ValueError unless 0 <= kept <= number of scores, and
    RunStopped where a score is nan. Bit-identical for every number of ranks, with a tie_order that is.
    """
    wide = scores.dtype == torch.float64
    flat = scores.detach().reshape(-1).to(torch.float64 if wide else torch.float32).contiguous()
    # The largest of scores with a nan is nan.
    nans = int(flat.isnan().sum()) if len(flat) and flat.amax().isnan() else 0
    total, bad = world.all_reduce(torch.tensor([len(flat), nans])).tolist()
    if not 0 <= kept <= total:
        raise ValueError(f"kept = {kept}: give a number in [0, {total}], the number of scores")
    if bad:
        raise RunStopped(f"{bad} of {total} scores are nan", EXIT_NON_FINITE)
    if kept == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    threshold, left = _threshold(flat, kept, 4 if wide else 2, world)
    mask = flat > threshold
    tied = (flat == threshold).nonzero().squeeze(1)
    counts = world.all_gather(torch.tensor([len(tied)]))
    if left == int(counts.sum()):
        mask[tied] = True
    elif tie_order is not None:
        mask[tied] = topk_shard(tie_order(tied), left, world)
    else:
        first = int(counts[: world.rank].sum())
        mask[tied[: max(0, left - first)]] = True
    return mask


def seeded_order(indices: Tensor, seed: int) -> Tensor:
    """(m,) float64 in [0, 2^52): a hash of each index and the seed; equal for two indices once in 2^52."""
    x = indices + (seed * 0x632BE59B + 0x51ED270B)
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (multiplier - (1 << 64))
    return ((x ^ ((x >> 31) & ((1 << 33) - 1))) >> 12 & ((1 << 52) - 1)).double()


def _keep(mask: Tensor, part: Slice, scores: Tensor, places: Tensor | None, count: int, seed: int) -> None:
    """Collective: set `count` bools of the mask, those of the largest scores at all ranks' places; None = anywhere."""

    def tie_order(tied: Tensor) -> Tensor:
        return seeded_order(part.indices()[tied if places is None else places[tied]], seed)

    own = slice(None) if places is None else places
    mask[own] = topk_shard(scores[own], count, part.world, tie_order)


def _threshold(scores: Tensor, kept: int, digits: int, world: World) -> tuple[float, int]:
    """(the kept-th largest score, how many equal to it are kept): its digits of 16 bits, from the uppermost down."""
    prefix, left = 0, kept
    for digit in reversed(range(digits)):
        # The image is signed: so is its uppermost digit.
        offset = BINS // 2 if digit == digits - 1 else 0
        from_top = world.all_reduce(_counts(scores, digit, prefix, offset)).flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, left))
        left -= int(from_top[place - 1]) if place else 0
        prefix = (prefix << 16) + BINS - 1 - place - offset
    return _flipped(torch.tensor([prefix], dtype=INTEGERS[scores.dtype])).view(scores.dtype).item(), left


def _counts(scores: Tensor, digit: int, prefix: int, offset: int) -> Tensor:
    """int64 (BINS,) on the CPU: how often digits + offset occur in the images that have `prefix` above this digit.

    Images are integers that are ordered as the scores are, with -0.0 as 0.0. With an offset all images count.
    """
    kernels = load_kernels("ghostmask.masks.kernels.topk_cpu") if scores.device.type == "cpu" else None
    if kernels:
        below_sign = torch.iinfo(INTEGERS[scores.dtype]).max
        bits = scores.view(INTEGERS[scores.dtype]).numpy()

        def work(first: int, end: int) -> Tensor:
            counts = torch.zeros(BINS, dtype=torch.int64)
            kernels.count(bits, first, end, below_sign, 16 * digit, prefix, offset, counts.numpy())
            return counts

        return torch.stack(split_over_threads(work, len(scores), SMALLEST_RANGE)).sum(0)
    counts = torch.zeros(BINS, dtype=torch.int64)
    for chunk in torch.split(scores, CHUNK):
        # Adding 0.0 turns -0.0 into 0.0.
        image = _flipped((chunk + 0.0).view(INTEGERS[chunk.dtype])).long() >> 16 * digit
        image = image if offset else image[image >> 16 == prefix]
        counts += torch.bincount((image + offset) & (BINS - 1), minlength=BINS).cpu()
    return counts


def _flipped(bits: Tensor) -> Tensor:
    """Negative floats order in reverse: all bits below their sign are flipped. It is its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
