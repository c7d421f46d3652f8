"""What does the relaxed mask do with a slice on the CPU: numba kernels that release the interpreter lock.

The same numbers as masks.kernels.relaxed_mask. A block of 1024 weights goes through short loops, one after the
other, that hand over in the first cache: what depends on one another is then short enough for a processor to work on
several rounds at once (all in one loop takes twice as long, measured). log2 and exp2 are polynomials, because calls of
libm would keep LLVM from vectorising the loops.
"""

# mypy: disable-error-code="no-untyped-call,attr-defined,call-arg"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ghostmask.engine.compiled import split_over_threads
from ghostmask.masks.kernels.noise import BLOCK, LANES, ROUNDS
from ghostmask.masks.kernels.relaxed_mask import EPS, try_out

SMALLEST_RANGE = 16
"""Blocks of 1024 weights worth a thread of their own."""
SHARES = 4
"""Parts of a slice per thread."""
WORD = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
TWO = np.uint64(2)
PAIRS = LANES // 2
"""Pairs of words per quarter of a block."""
F = np.float32
# log2(1 + f) = f (L0 + L1 f + ...) on [sqrt(1/2), sqrt(2)] - 1 and 2^r = 1 + r (E0 + E1 r + ...) on [-1/2, 1/2]:
# minimax fits, relative errors 1.7e-7 and 0.9e-7.
L0, L1, L2, L3 = F(1.4426949620), F(-0.7213527881), F(0.4809232420), F(-0.3602396387)
L4, L5, L6, L7 = F(0.2870987097), F(-0.2488768890), F(0.2340422965), F(-0.1458115156)
E0, E1, E2, E3, E4 = F(0.6931469776), F(0.2402224208), F(0.0555073374), F(0.0096715127), F(0.0013264727)
SQRT_HALF_BITS, MANTISSA, ONE_BITS = np.int32(0x3F3504F3), np.int32(0x007FFFFF), np.int32(0x3F800000)
ZERO, ONE, FOUR, LIMIT, ROUNDS_OFF = F(0), F(1), F(4), F(60), F(1.5 * 2**23)
UNEVEN = np.uint32(1)
ROUND, ROUNDED_OFF, QUIET_NAN = np.uint32(0x7FFF), np.uint32(16), np.uint16(0x7FC0)
FAST = {"contract", "nsz"}
"""What may be rearranged: fused multiply-adds, and the sign of zero; nothing about nan."""


def masked(out: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float) -> None:
    """See `masks.kernels.relaxed_mask.masked_`."""
    narrow = out.dtype == torch.bfloat16  # its bits then, and no float32 vector
    outs = (np.empty(0, F), _array(out.view(torch.uint16))) if narrow else (_array(out), np.empty(0, np.uint16))
    _on_blocks(_masked, (_array(weight), _array(probability), *outs), first, key, temperature)


def gradients(
    gradient: Tensor, weight: Tensor, probability: Tensor, first: int, key: int, temperature: float, slope: Tensor
) -> None:
    """See `masks.kernels.relaxed_mask.gradients_`."""
    _on_blocks(_gradients, [_array(t) for t in (gradient, weight, probability, slope)], first, key, temperature)


def _on_blocks(kernel: Any, arrays: Sequence[np.ndarray], first: int, key: int, temperature: float) -> None:
    """The kernel on the noise blocks of the arrays' weights, `first` and on, shared between the threads."""
    begin, end = first // BLOCK, -(-(first + len(arrays[0])) // BLOCK)
    # The key, and Philox's multipliers: as constants LLVM would merge them with shifts, into slower instructions.
    seeds, numbers = np.array((key, *MULTIPLIERS), np.uint64), (F(1 / temperature), F(EPS))

    def work(a: int, b: int) -> None:
        kernel(*arrays, first, begin + a, begin + b, seeds, numbers)

    split_over_threads(work, end - begin, SMALLEST_RANGE, shares=SHARES)


def _array(vector: Tensor) -> np.ndarray:
    return vector.detach().numpy()


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _philox(counter, k0, k1, m0, m1):  # type: ignore[no-untyped-def]
    """The four words of a counter, each in the lower half of its result; what is in the upper halves means nothing."""
    c0, c1, c2, c3 = counter, counter >> SHIFT, np.uint64(0), np.uint64(0)
    for _ in range(ROUNDS):
        p0, p1 = (c0 & WORD) * (m0 & WORD), (c2 & WORD) * (m1 & WORD)
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ (c1 ^ k0), p1, (p0 >> SHIFT) ^ (c3 ^ k1), p0
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return c0, c1, c2, c3


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _fill(words, block, seeds):  # type: ignore[no-untyped-def]
    """words[i] = the Philox word of weight 1024 block + i.

    words: uint64, two words in each. The two are of neighbouring counters, that is of two vectors of 64-bit lanes whose
    lower halves one instruction joins.
    """
    k0, k1, m0, m1 = seeds[0], seeds[0] >> SHIFT, seeds[1], seeds[2]
    origin = np.uint64(block) * np.uint64(LANES)
    for j in range(PAIRS):
        i = np.uint64(j)  # unsigned: a negative index would keep LLVM from vectorising
        a0, a1, a2, a3 = _philox(origin + TWO * i, k0, k1, m0, m1)
        b0, b1, b2, b3 = _philox(origin + TWO * i + np.uint64(1), k0, k1, m0, m1)
        words[i], words[i + np.uint64(PAIRS)] = a0 & WORD | b0 << SHIFT, a1 & WORD | b1 << SHIFT
        words[i + np.uint64(2 * PAIRS)] = a2 & WORD | b2 << SHIFT
        words[i + np.uint64(3 * PAIRS)] = a3 & WORD | b3 << SHIFT


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _log2(x):  # type: ignore[no-untyped-def]
    """Binary logarithm of a positive normal float32, to 1e-7 or 1 ulp."""
    bits = np.int32(F(x).view(np.int32) - SQRT_HALF_BITS)
    exponent = F(np.int32(bits >> np.int32(23)))
    f = np.int32((bits & MANTISSA) + SQRT_HALF_BITS).view(np.float32) - ONE
    p = ((((((L7 * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    return exponent + f * p


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _exp2(x):  # type: ignore[no-untyped-def]
    """2^x of a float32 in [-LIMIT, LIMIT], to about 2 ulp."""
    shifted = F(x + ROUNDS_OFF)  # x rounded to an integer, in the last bits
    r = x - (shifted - ROUNDS_OFF)
    p = (((E4 * r + E3) * r + E2) * r + E1) * r + E0
    return (p * r + ONE) * np.int32((shifted.view(np.int32) << np.int32(23)) + ONE_BITS).view(np.float32)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _limited(x, low, high):  # type: ignore[no-untyped-def]
    """x limited to [low, high]; nan stays nan."""
    x = low if x < low else x
    return high if x > high else x


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _power(words, s, out, numbers):  # type: ignore[no-untyped-def]
    """out = -x log2 e, x = (log s - log(1 - s) + log u - log(1 - u)) / tau: (1 - m) / m is 2 to that power.

    Limited to [-LIMIT, LIMIT]; nan where s is. u = (word | 1) / 2^32. numbers: 1 / tau and EPS.
    """
    inverse_temperature, eps = numbers
    for i in range(len(s)):
        p = _limited(s[i], eps, ONE - eps)
        out[i] = (F(words[i] | UNEVEN) * p) / (F(np.uint32(~words[i]) | UNEVEN) * (ONE - p))
    for i in range(len(s)):
        ratio = out[i]
        # ratio x 0 is nan where ratio is: _log2 takes the bits of nan for a number.
        out[i] = _limited(_log2(ratio) * -inverse_temperature, -LIMIT, LIMIT) + ratio * ZERO


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _times_mask(w, power, out):  # type: ignore[no-untyped-def]
    for i in range(len(w)):
        out[i] = w[i] / (ONE + _exp2(power[i]))


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _chain_rule(g, w, s, power, slope, inverse_temperature):  # type: ignore[no-untyped-def]
    """g <- g m, slope = 4 g w m (1 - m) / tau, but 0 where s <= 0."""
    for i in range(len(w)):
        odds = _exp2(power[i])
        m = ONE / (ONE + odds)
        g[i] *= m
        slope[i] = (g[i] * w[i]) * (odds * m) * (ZERO if s[i] <= ZERO else FOUR * inverse_temperature)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _to_bfloat16(x, bits):  # type: ignore[no-untyped-def]
    """To the nearest, halves to the even one, as torch rounds."""
    for i in range(len(bits)):
        word = F(x[i]).view(np.uint32)
        nearest = (word + ROUND + (word >> ROUNDED_OFF & UNEVEN)) >> ROUNDED_OFF
        bits[i] = np.uint16(nearest) if x[i] == x[i] else QUIET_NAN


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _masked(w, s, out, out_bits, first, begin, end, seeds, numbers):  # type: ignore[no-untyped-def]
    """out = w m on the noise blocks begin .. end - 1; all arrays start with weight `first` of the network."""
    pairs, power, values = np.empty(BLOCK // 2, np.uint64), np.empty(BLOCK, F), np.empty(BLOCK, F)
    for block in range(begin, end):
        start = block * BLOCK - first
        part = slice(max(start, 0), min(start + BLOCK, len(w)))
        _fill(pairs, block, seeds)
        _power(pairs.view(np.uint32)[part.start - start :], s[part], power, numbers)
        if len(out_bits) > 0:
            _times_mask(w[part], power, values)
            _to_bfloat16(values, out_bits[part])
        else:
            _times_mask(w[part], power, out[part])


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _gradients(g, w, s, slope, first, begin, end, seeds, numbers):  # type: ignore[no-untyped-def]
    """_chain_rule on the noise blocks begin .. end - 1, as in _masked."""
    pairs, power = np.empty(BLOCK // 2, np.uint64), np.empty(BLOCK, F)
    for block in range(begin, end):
        start = block * BLOCK - first
        part = slice(max(start, 0), min(start + BLOCK, len(w)))
        _fill(pairs, block, seeds)
        _power(pairs.view(np.uint32)[part.start - start :], s[part], power, numbers)
        _chain_rule(g[part], w[part], s[part], power, slope[part], numbers[0])


def compile_all() -> None:
    """Compile the kernels (or load them from numba's cache, which does not see changes of masks.kernels.noise)."""
    try_out(masked, gradients, torch.device("cpu"))
