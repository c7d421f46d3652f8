"""Which `kept` weights have the largest scores, over all tensors together, and exactly that many?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.errors import EXIT_NON_FINITE, RunStopped

BINS = 1 << 16
"""Bins of a pass: the upper, then the lower 16 bits of the scores' integer image."""
CHUNK = 1 << 22
"""Elements handled at once: bounds the extra memory to a few times 4 M int64."""


def kept_count(density: float, prunable: int) -> int:
    """Number of weights kept of `prunable` at `density` in (0, 1]: round(density * prunable), at least 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density = {density}: give a number in (0, 1]")
    return max(1, round(density * prunable))


def topk_masks(scores: list[Tensor], kept: int) -> list[Tensor]:
    """Boolean masks shaped like `scores` with exactly `kept` ones: the largest scores of all tensors together.

    scores: float32 tensors (other types are rounded to it), the same on every rank (so is the result; nothing is
    communicated). Equal scores are taken in order of (tensor, position in logical order); -0.0 equals 0.0, and
    infinities are ordinary scores. Raises ValueError unless 0 <= kept <= number of scores, and RunStopped where a
    score is nan.

    Radix select: a histogram of the upper 16 bits finds the bin of the kept-th largest score, one of the lower 16 bits
    within that bin finds the score itself. A version for sharded scores all-reduces these two histograms.
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= kept <= total:
        raise ValueError(f"kept = {kept}: give a number in [0, {total}], the number of scores")
    if kept == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    _refuse_nan(scores)
    high, left = _select(scores, kept, prefix=None)
    low, left = _select(scores, left, prefix=high)
    return _cut(scores, (high << 16) | low, left)


def _refuse_nan(scores: list[Tensor]) -> None:
    for number, score in enumerate(scores):
        bad = int(score.isnan().sum())
        if bad:
            raise RunStopped(f"scores of tensor {number}: {bad} of {score.numel()} are nan", EXIT_NON_FINITE)


def _images(score: Tensor) -> Iterator[Tensor]:
    """Chunk by chunk, int64 images in [0, 2^32) that are ordered as the scores are."""
    for chunk in torch.split(score.detach().reshape(-1), CHUNK):
        # Adding 0.0 turns -0.0 into 0.0. Negative floats order in reverse: all their bits are flipped.
        bits = (chunk.float() + 0.0).view(torch.int32).long()
        yield torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def _select(scores: list[Tensor], kept: int, prefix: int | None) -> tuple[int, int]:
    """(bin of the kept-th largest score, how many of that bin are kept), among the scores with that upper half."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    for score in scores:
        for image in _images(score):
            part = image >> 16 if prefix is None else image[image >> 16 == prefix] & (BINS - 1)
            counts += torch.bincount(part, minlength=BINS).cpu()
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, kept))
    above = int(from_top[place - 1]) if place else 0
    return BINS - 1 - place, kept - above


def _cut(scores: list[Tensor], threshold: int, ties_left: int) -> list[Tensor]:
    """The masks: all images above the threshold and the first `ties_left` equal to it."""
    masks = []
    for score in scores:
        pieces = []
        for image in _images(score):
            piece = image > threshold
            ties = (image == threshold).nonzero().squeeze(1)[:ties_left]
            piece[ties] = True
            ties_left -= len(ties)
            pieces.append(piece)
        masks.append(torch.cat(pieces).view(score.shape))
    return masks
