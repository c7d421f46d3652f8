"""Which random word belongs to weight i of the network in this step: Philox4x32-7, keyed by where the run is."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024
LANES = 256
ROUNDS = 7
"""The fewest with which Philox4x32 passes all of BigCrush (Salmon et al., 2011, table 2); ten are a margin that these
masks have no use for, and cost a tenth of the operator's time."""
BELOW_ONE = 1 - 2.0**-24
"""The largest float32 number below 1."""
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def noise_key(seed: int, step: int, sample: int) -> int:
    """The Philox key, in [0, 2^64), of one forward pass: nothing of its noise has to be stored or restored.

    seed: of the run; step: global number of the optimizer step; sample: number of the noise sample within the step. A
    hash of all three, so that no two keys are related.
    """
    return hashed(f"mask noise {seed} {step} {sample}", 8)


def hashed(text: str, size: int) -> int:
    """A hash of `text`, in [0, 256^size)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")


def generator(text: str) -> np.random.Generator:
    """Random numbers that are a function of `text` alone, on every machine."""
    return np.random.Generator(np.random.Philox(key=hashed(text, 16)))


def random_words(key: int, first: int, count: int, device: torch.device | str) -> Tensor:
    """int64 (count,) in [0, 2^32): the words of weights first, ..., first + count - 1 of the network.

    A word depends on the key, in [0, 2^64), and the weight's index alone. Weight i of block b = i // 1024 takes word
    (i % 1024) // 256 of the counter 256 b + i % 256: a counter's four words are 256 weights apart, so that vector lanes
    hold neighbouring weights.
    """
    begin, end = first // BLOCK, -(-(first + count) // BLOCK)
    counter = torch.arange(begin * LANES, end * LANES, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox((counter & _WORD, counter >> 32, zero, zero), (key & _WORD, key >> 32))
    start = first - begin * BLOCK
    return torch.stack([word.view(-1, LANES) for word in words], 1).view(-1)[start : start + count]


def uniforms(key: int, first: int, count: int, device: torch.device | str) -> Tensor:
    """float32 (count,), uniform in (0, 1), of the same weights: u < s keeps a weight with probability s."""
    words = random_words(key, first, count, device)
    return ((words.double() + 0.5) * 2.0**-32).float().clamp_(max=BELOW_ONE)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The four 32-bit output words of Philox4x32-7 (Salmon et al., 2011); counter: int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product wraps to int64; its two halves are right all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
