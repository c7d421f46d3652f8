"""Which sample comes when, and from which random word is it augmented: functions of (seed, epoch, sample index) alone.

Nothing here knows of time, threads or earlier calls, so a resumed run, or one on another number of ranks, gets the same
answers: ranks share out the parts of a global batch (engine.data.Parts), and a part is the same on whichever rank.
Only raw words of Philox are used: numpy promises their values for ever, unlike those of its Generator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # it would import torch
    from ghostmask.engine.data import Parts

Words = NDArray[np.uint64]

ORDER, AUGMENTATION, STORAGE, SPLIT = range(4)
"""Purposes: each draws from a Philox stream of its own."""


def raw_words(seed: int, epoch: int, purpose: int, num_words: int) -> Words:
    """num_words random 64-bit words of the Philox stream with key (seed, epoch, purpose)."""
    key = np.array([seed, 4 * epoch + purpose], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key).random_raw(num_words), dtype=np.uint64)


def permutation(seed: int, epoch: int, num_samples: int, purpose: int = ORDER) -> NDArray[np.int64]:
    """(num_samples,) a uniform random order of 0 .. num_samples - 1."""
    return np.argsort(raw_words(seed, epoch, purpose, num_samples), kind="stable")


def sample_words(seed: int, epoch: int, indices: NDArray[Any], purpose: int = AUGMENTATION) -> Words:
    """One random 64-bit word per sample index: output number index + 1 of a SplitMix64 stream (Steele et al. 2014)."""
    start = raw_words(seed, epoch, purpose, 1)
    state = start + (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)), dtype=np.uint64)


def train_rows(
    seed: int, epoch: int, *, num_train: int, batch_size: int, parts: Parts, first_step: int = 0,
    samples: NDArray[np.int64] | None = None,
) -> Words:  # fmt: skip
    """((steps - first_step) * batch_size / V * parts.count, 2): sample index and random word, in this rank's order.

    samples: the epoch's order; None = `permutation`. Global batch j is samples[j * batch_size : (j + 1) * batch_size];
    part p of it is elements p, p + V, ..., with V = parts.total, which divides batch_size. Of each batch come the
    rank's parts, one after the other. The last incomplete global batch is left out.
    """
    steps, each = num_train // batch_size, batch_size // parts.total
    samples = permutation(seed, epoch, num_train) if samples is None else samples
    order = samples[: steps * batch_size].reshape(steps, each, parts.total)
    own = order[first_step:, :, parts.first : parts.first + parts.count]
    indices = own.transpose(0, 2, 1).reshape(-1)
    return np.stack([indices.astype(np.uint64), sample_words(seed, epoch, indices)], axis=1)


def eval_rows(num_eval: int, rank: int, num_ranks: int) -> Words:
    """(this rank's share, 2): indices rank, rank + num_ranks, ... and zeros; each sample belongs to one rank."""
    indices = np.arange(rank, num_eval, num_ranks, dtype=np.uint64)
    return np.stack([indices, np.zeros_like(indices)], axis=1)
