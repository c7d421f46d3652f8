"""Which `kept` weights have the largest scores, over all tensors and all ranks together, and exactly that many?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.sharding.shards import ranges_within
from ghostmask.engine.world import World, single
from ghostmask.masks.kernels.compiled import load_kernels, split_over_threads

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


def topk_masks(scores: list[Tensor], kept: int) -> list[Tensor]:
    """Boolean masks shaped like `scores` with exactly `kept` ones: the largest scores of all tensors together.

    scores: the same on every rank (so is the result; nothing is communicated); float32, or float64 where one of them
    is, other types are rounded to float32. Equal scores are taken in order of (tensor, position in logical order);
    -0.0 equals 0.0, and infinities are ordinary scores. Raises ValueError unless 0 <= kept <= number of scores, and
    RunStopped where a score is nan.
    """
    return _largest(scores, kept, single())


def topk_shard(scores: Tensor, kept: int, world: World) -> Tensor:
    """Collective: the mask of this rank's shard of the scores, `kept` ones over all ranks: what `topk_masks` gives.

    scores: (n,) this rank's run of all scores, which lie end to end in rank order; n may differ and be 0, the type is
    the same on every rank. No score leaves its rank: 16 bits per pass, the ranks' histograms are added up (512 KB),
    and equal scores at the threshold go to the lower ranks first. Bit-identical for every number of ranks.
    """
    return _largest([scores], kept, world)[0]


def _largest(scores: list[Tensor], kept: int, world: World) -> list[Tensor]:
    wide = any(score.dtype == torch.float64 for score in scores)
    flat = [s.detach().reshape(-1).to(torch.float64 if wide else torch.float32).contiguous() for s in scores]
    _check(flat, kept, world)
    if kept == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    threshold, left = _threshold(flat, kept, 4 if wide else 2, world)
    masks = _cut(flat, threshold, left, world)
    return [mask.view(score.shape) for mask, score in zip(masks, scores, strict=True)]


def _check(scores: list[Tensor], kept: int, world: World) -> None:
    # The largest of scores with a nan is nan.
    nans = [int(score.isnan().sum()) if len(score) and score.amax().isnan() else 0 for score in scores]
    everywhere = world.all_reduce(torch.tensor([[len(score) for score in scores], nans]))
    total = int(everywhere[0].sum())
    if not 0 <= kept <= total:
        raise ValueError(f"kept = {kept}: give a number in [0, {total}], the number of scores")
    for number, (numel, bad) in enumerate(everywhere.T.tolist()):
        if bad:
            raise RunStopped(f"scores of tensor {number}: {bad} of {numel} are nan", EXIT_NON_FINITE)


def _threshold(scores: list[Tensor], kept: int, digits: int, world: World) -> tuple[float, int]:
    """(the kept-th largest score, how many equal to it are kept): its digits of 16 bits, from the uppermost down."""
    prefix, left = 0, kept
    for digit in reversed(range(digits)):
        # The image is signed: so is its uppermost digit.
        offset = BINS // 2 if digit == digits - 1 else 0
        place, left = _bin(_counts(scores, digit, prefix, offset), left, world)
        prefix = (prefix << 16) + place - offset
    return _score_of(prefix, scores[0].dtype), left


def _counts(scores: list[Tensor], digit: int, prefix: int, offset: int) -> Tensor:
    """int64 (BINS,) on the CPU: how often digits + offset occur in the images that have `prefix` above this digit.

    Images are integers that are ordered as the scores are, with -0.0 as 0.0. With an offset all images count.
    """
    kernels = (
        load_kernels("ghostmask.masks.scoring.topk_cpu")
        if all(score.device.type == "cpu" for score in scores)
        else None
    )
    if kernels:
        return _counts_on_cpu(kernels, scores, 16 * digit, prefix, offset)
    counts = torch.zeros(BINS, dtype=torch.int64)
    for score in scores:
        for chunk in torch.split(score, CHUNK):
            # Adding 0.0 turns -0.0 into 0.0.
            image = _flipped((chunk + 0.0).view(INTEGERS[chunk.dtype])).long() >> 16 * digit
            image = image if offset else image[image >> 16 == prefix]
            counts += torch.bincount((image + offset) & (BINS - 1), minlength=BINS).cpu()
    return counts


def _counts_on_cpu(kernels: Any, scores: list[Tensor], shift: int, prefix: int, offset: int) -> Tensor:
    below_sign = torch.iinfo(INTEGERS[scores[0].dtype]).max
    bits = [score.view(INTEGERS[score.dtype]).numpy() for score in scores]
    sizes = [len(part) for part in bits]

    def work(first: int, end: int) -> Tensor:
        """Of the scores first .. end - 1 of all tensors laid end to end."""
        counts = torch.zeros(BINS, dtype=torch.int64)
        for part, (low, high) in zip(bits, ranges_within(sizes, first, end), strict=True):
            kernels.count(part, low, high, below_sign, shift, prefix, offset, counts.numpy())
        return counts

    return torch.stack(split_over_threads(work, sum(sizes), SMALLEST_RANGE)).sum(0)


def _bin(counts: Tensor, kept: int, world: World) -> tuple[int, int]:
    """Collective: (bin of the kept-th largest, how many of that bin are kept), from every rank's counts."""
    from_top = world.all_reduce(counts).flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, kept))
    above = int(from_top[place - 1]) if place else 0
    return BINS - 1 - place, kept - above


def _score_of(image: int, dtype: torch.dtype) -> float:
    return _flipped(torch.tensor([image], dtype=INTEGERS[dtype])).view(dtype).item()


def _flipped(bits: Tensor) -> Tensor:
    """Negative floats order in reverse: all bits below their sign are flipped. It is its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _cut(scores: list[Tensor], threshold: float, ties_left: int, world: World) -> list[Tensor]:
    """The masks: all scores above the threshold and the first `ties_left` equal to it, lower ranks first."""
    masks = [score > threshold for score in scores]
    ties = sum(int((chunk == threshold).sum()) for score in scores for chunk in torch.split(score, CHUNK))
    ties_left -= int(world.all_gather(torch.tensor([ties]))[: world.rank].sum())
    for score, mask in zip(scores, masks, strict=True):
        for chunk, part in zip(torch.split(score, CHUNK), torch.split(mask, CHUNK), strict=True):
            if ties_left <= 0:
                return masks
            tied = (chunk == threshold).nonzero().squeeze(1)[:ties_left]
            part[tied] = True
            ties_left -= len(tied)
    return masks
