"""What does the relaxed mask do with a slice on CUDA: Triton kernels, one launch for each pass.

The same words as masks.kernels.noise and the same formulas as masks.kernels.relaxed_mask. A program takes 4096
weights that lie in 4 blocks of the noise: 1024 Philox counters, all four words of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostmask.masks.kernels.noise import BLOCK, LANES, ROUNDS
from ghostmask.masks.kernels.relaxed_mask import EPS, try_out

BLOCKS = tl.constexpr(4)
"""Noise blocks of 1024 weights per program."""
LANES_ = tl.constexpr(LANES)
BLOCK_ = tl.constexpr(BLOCK)
ROUNDS_ = tl.constexpr(ROUNDS)
EPS_ = tl.constexpr(EPS)
LIMIT = tl.constexpr(60.0)
EACH_STEP = ["block", "low_key", "high_key"]
"""Arguments that change from step to step: no value of theirs may be compiled into a kernel of its own."""


def masked(out: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float) -> None:
    """See `masks.kernels.relaxed_mask.masked_`."""
    place, keys = divmod(first, BLOCK), _halves(key)
    _masked[_programs(len(out), first)](out, weight, probability, len(out), *place, *keys, 1 / temperature)


def gradients(
    gradient: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float, slope: Tensor
) -> None:
    """See `masks.kernels.relaxed_mask.gradients_`."""
    numel, place, keys = len(gradient), divmod(first, BLOCK), _halves(key)
    _gradients[_programs(numel, first)](gradient, weight, probability, slope, numel, *place, *keys, 1 / temperature)


def _programs(numel: int, first: int) -> tuple[int]:
    return (triton.cdiv(first % BLOCK + numel, BLOCKS.value * BLOCK),)


def _halves(key: int) -> tuple[int, int]:
    """The lower and upper half as signed 32-bit numbers: integers of other sizes would be compiled anew."""
    low, high = ((half ^ 1 << 31) - (1 << 31) for half in (key & 0xFFFFFFFF, key >> 32))
    return low, high


@triton.jit(do_not_specialize=EACH_STEP)
def _masked(out, weight, probability, numel, block, offset, low_key, high_key, inverse_temperature):  # type: ignore[no-untyped-def]
    start, low, high = _my_part(numel, offset)
    words = _words(block, low_key, high_key)
    for k in tl.static_range(4):
        i = _lanes(k)
        inside = (i >= low) & (i < high)
        odds = _inverse_odds(words[k], tl.load(probability + start + i, mask=inside, other=0.5), inverse_temperature)
        value = tl.load(weight + start + i, mask=inside, other=0.0) / (1.0 + odds)
        tl.store(out + start + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=EACH_STEP)
def _gradients(gradient, weight, probability, slope, numel, block, offset, low_key, high_key, inverse_temperature):  # type: ignore[no-untyped-def]
    start, low, high = _my_part(numel, offset)
    words = _words(block, low_key, high_key)
    for k in tl.static_range(4):
        i = _lanes(k)
        inside = (i >= low) & (i < high)
        s = tl.load(probability + start + i, mask=inside, other=0.5)
        odds = _inverse_odds(words[k], s, inverse_temperature)
        m = 1.0 / (1.0 + odds)
        kept = tl.load(gradient + start + i, mask=inside, other=0.0) * m
        factor = tl.where(s <= 0.0, 0.0, 4.0 * inverse_temperature)
        grad_s = kept * tl.load(weight + start + i, mask=inside, other=0.0) * (odds * m) * factor
        tl.store(gradient + start + i, kept, mask=inside)
        tl.store(slope + start + i, grad_s, mask=inside)


@triton.jit
def _my_part(numel, offset):  # type: ignore[no-untyped-def]
    """(number in the slice of this program's first lane, the lanes low .. high - 1 that lie in the slice)."""
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK_) - offset
    low = tl.where(start < 0, -start, 0).to(tl.int32)
    end = numel - start
    return start, low, tl.where(end < BLOCKS * BLOCK_, end, BLOCKS * BLOCK_).to(tl.int32)


@triton.jit
def _lanes(k):  # type: ignore[no-untyped-def]
    """The program's lanes whose noise is word k of their counters, (BLOCKS, LANES)."""
    return tl.arange(0, BLOCKS)[:, None] * BLOCK_ + k * LANES_ + tl.arange(0, LANES_)[None, :]


@triton.jit
def _words(block, low_key, high_key):  # type: ignore[no-untyped-def]
    """The four words (BLOCKS, LANES) of each counter of masks.kernels.noise; block: that of program 0."""
    row = (block + tl.program_id(0).to(tl.int64) * BLOCKS) * LANES_
    counter = row + tl.arange(0, BLOCKS)[:, None] * LANES_ + tl.arange(0, LANES_)[None, :]
    low, zero = counter.to(tl.uint32), (counter * 0).to(tl.uint32)
    key = (high_key.to(tl.int64) << 32) | (low_key.to(tl.int64) & 0xFFFFFFFF)
    return tl.philox(key, low, (counter >> 32).to(tl.uint32), zero, zero, n_rounds=ROUNDS_)


@triton.jit
def _inverse_odds(word, s, inverse_temperature):  # type: ignore[no-untyped-def]
    """(1 - m) / m, limited to 2^-LIMIT .. 2^LIMIT; u = (word | 1) / 2^32; nan where s is."""
    p = tl.where(s < EPS_, EPS_, s)
    p = tl.where(p > 1.0 - EPS_, 1.0 - EPS_, p)
    ratio = (word | 1).to(tl.float32) * p / (((word ^ 0xFFFFFFFF) | 1).to(tl.float32) * (1.0 - p))
    x = -tl.log2(ratio) * inverse_temperature
    x = tl.where(x < -LIMIT, -LIMIT, x)
    return tl.exp2(tl.where(x > LIMIT, LIMIT, x))


def compile_all() -> None:
    """Compile the kernels, for float32 and bfloat16."""
    try_out(masked, gradients, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
