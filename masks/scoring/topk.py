"""Which `kept` weights have the largest scores, over all tensors and all ranks together, and exactly that many?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ghostmask.engine.compiled import load_kernels, split_over_threads
from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.world import World

BINS = 1 << 16
"""Bins of a pass: 16 bits of the scores' integer image, from the upper ones down."""
CHUNK = 1 << 22
"""Elements that torch handles at once: bounds the extra memory to a few times 4 M int64."""
SMALLEST_RANGE = 1 << 16
"""Elements worth a thread of their own."""
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Types that hold a score's bits."""


def kept_count(density: float, prunable: int) -> int:
    """Number of weights kept of `prunable` at `density` in (0, 1]: round(density * prunable), at least 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density = {density}: give a number in (0, 1]")
    return max(1, round(density * prunable))


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
    _check(flat, kept, world)
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


def _check(scores: Tensor, kept: int, world: World) -> None:
    # The largest of scores with a nan is nan.
    nans = int(scores.isnan().sum()) if len(scores) and scores.amax().isnan() else 0
    total, bad = world.all_reduce(torch.tensor([len(scores), nans])).tolist()
    if not 0 <= kept <= total:
        raise ValueError(f"kept = {kept}: give a number in [0, {total}], the number of scores")
    if bad:
        raise RunStopped(f"{bad} of {total} scores are nan", EXIT_NON_FINITE)


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
        bits, below_sign = scores.view(INTEGERS[scores.dtype]).numpy(), torch.iinfo(INTEGERS[scores.dtype]).max

        def work(first: int, end: int) -> Tensor:
            found = torch.zeros(BINS, dtype=torch.int64)
            kernels.count(bits, first, end, below_sign, 16 * digit, prefix, offset, found.numpy())
            return found

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
