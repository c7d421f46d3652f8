"""Which random word belongs to weight i of tensor t in this step: Philox4x32-7, keyed by where the run is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024
LANES = 256
ROUNDS = 7
"""The fewest with which Philox4x32 passes all of BigCrush (Salmon et al., 2011, table 2); ten are a margin that these
masks have no use for, and cost a tenth of the operator's time."""
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True)
class NoiseKey:
    """What the noise of one forward pass is a function of; nothing of it has to be stored or restored.

    seed: of the run; step: global number of the optimizer step; sample: number of the noise sample (or microbatch)
    within the step; rank: the rank, or one number on all ranks for noise that they share.
    """

    seed: int
    step: int
    sample: int
    rank: int

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The 64-bit Philox key as an int64 scalar: a hash of all four numbers, so that no two keys are related."""
        text = f"mask noise {self.seed} {self.step} {self.sample} {self.rank}"
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
        return torch.tensor(value, dtype=torch.int64).to(device, non_blocking=True)


def random_words(key: Tensor, number: int, first: int, count: int) -> Tensor:
    """int64 (count,) in [0, 2^32): the words of weights first, ..., first + count - 1 of tensor `number`.

    A word depends on the key, the tensor's number and the weight's index alone. Weight i of block b = i // 1024 takes
    word (i % 1024) // 256 of the counter (256 b + i % 256, number): a counter's four words are 256 weights apart, so
    that vector lanes hold neighbouring weights. `first` is a multiple of 1024.
    """
    if first % BLOCK:
        raise ValueError(f"first = {first}: give a multiple of {BLOCK}")
    blocks = -(-count // BLOCK)
    start = first // BLOCK * LANES
    counter = torch.arange(start, start + blocks * LANES, device=key.device)
    zero = torch.zeros((), dtype=torch.int64, device=key.device)
    words = philox((counter & _WORD, counter >> 32, zero + number, zero), (key & _WORD, (key >> 32) & _WORD))
    return torch.stack([word.view(blocks, LANES) for word in words], 1).view(-1)[:count]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four 32-bit output words of Philox4x32-7 (Salmon et al., 2011); all words int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product wraps to int64; its two halves are right all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
