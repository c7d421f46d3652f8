"""Which `kept` weights have the largest scores, over all tensors and all ranks together, and exactly that many?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.errors import EXIT_NON_FINITE, RunStopped
from engine.world import World, single

BINS = 1 << 16
"""Bins of a pass: 16 bits of the scores' integer image, from the upper ones down."""
CHUNK = 1 << 22
"""Elements handled at once: bounds the extra memory to a few times 4 M int64."""


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
    _check(scores, kept, world)
    if kept == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    wide = any(score.dtype == torch.float64 for score in scores)
    threshold, left = _threshold(scores, kept, wide, world)
    return _cut(scores, wide, threshold, left, world)


def _check(scores: list[Tensor], kept: int, world: World) -> None:
    counts = torch.tensor([[score.numel(), int(score.isnan().sum())] for score in scores])
    everywhere = world.all_reduce(counts.clone())
    total = int(everywhere[:, 0].sum())
    if not 0 <= kept <= total:
        raise ValueError(f"kept = {kept}: give a number in [0, {total}], the number of scores")
    for number, (numel, bad) in enumerate(everywhere.tolist()):
        if bad:
            raise RunStopped(f"scores of tensor {number}: {bad} of {numel} are nan", EXIT_NON_FINITE)


def _threshold(scores: list[Tensor], kept: int, wide: bool, world: World) -> tuple[float, int]:
    """(the kept-th largest score, how many equal to it are kept): its digits of 16 bits, from the uppermost down."""
    digits = 4 if wide else 2
    counts = torch.zeros(BINS, dtype=torch.int64)
    for image in _images(scores, wide):
        counts += torch.bincount((image >> 16 * (digits - 1)) + BINS // 2, minlength=BINS).cpu()
    place, left = _bin(counts, kept, world)
    prefix = place - BINS // 2  # the image is signed: so is its uppermost digit
    inside = [image[image >> 16 * (digits - 1) == prefix] for image in _images(scores, wide)]
    image = torch.cat(inside) if inside else torch.zeros(0, dtype=torch.int64)
    for digit in reversed(range(digits - 1)):
        counts = torch.bincount((image >> 16 * digit) & (BINS - 1), minlength=BINS).cpu()
        place, left = _bin(counts, left, world)
        prefix = (prefix << 16) | place
        image = image[image >> 16 * digit == prefix]
    return _score_of(prefix, wide), left


def _images(scores: list[Tensor], wide: bool) -> Iterator[Tensor]:
    """Chunk by chunk, int64 images that are ordered as the scores are; 32 bits of them count unless `wide`."""
    for score in scores:
        for chunk in torch.split(score.detach().reshape(-1), CHUNK):
            # Adding 0.0 turns -0.0 into 0.0.
            floats = (chunk.double() if wide else chunk.float()) + 0.0
            yield _flipped(floats.view(torch.int64 if wide else torch.int32)).long()


def _flipped(bits: Tensor) -> Tensor:
    """Negative floats order in reverse: all bits below their sign are flipped. It is its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _score_of(image: int, wide: bool) -> float:
    bits = _flipped(torch.tensor([image], dtype=torch.int64 if wide else torch.int32))
    return bits.view(torch.float64 if wide else torch.float32).item()


def _bin(counts: Tensor, kept: int, world: World) -> tuple[int, int]:
    """Collective: (bin of the kept-th largest, how many of that bin are kept), from every rank's counts."""
    from_top = world.all_reduce(counts).flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, kept))
    above = int(from_top[place - 1]) if place else 0
    return BINS - 1 - place, kept - above


def _cut(scores: list[Tensor], wide: bool, threshold: float, ties_left: int, world: World) -> list[Tensor]:
    """The masks: all scores above the threshold and the first `ties_left` equal to it, lower ranks first."""
    compared = [(s.detach().double() if wide else s.detach().float()).reshape(-1) for s in scores]
    ties = [(score == threshold).nonzero().squeeze(1) for score in compared]
    before = world.all_gather(torch.tensor([sum(len(t) for t in ties)]))[: world.rank].sum()
    ties_left = max(0, ties_left - int(before))
    masks = []
    for score, like, tied in zip(compared, scores, ties, strict=True):
        mask = score > threshold
        mask[tied[:ties_left]] = True
        ties_left -= min(ties_left, len(tied))
        masks.append(mask.view(like.shape))
    return masks
