"""What does the relaxed mask do with one tensor on the CPU: numba kernels that release the interpreter lock.

The same numbers as the torch form in masks.relaxed_mask. log2 and exp2 are polynomials, because calls of libm would
keep LLVM from vectorising the loops. A block goes through four short loops rather than one long one: what depends on
one another is then short enough for a processor to work on several rounds at once (a third less time, measured).
"""

from __future__ import annotations

import numba
import numpy as np

BLOCK = 1024
"""Weights per unit of work; see masks.noise."""
LANES = 256
WORD = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
ROUNDS = 10
F = np.float32
# log2(1 + f) = f (L0 + L1 f + ...) on [sqrt(1/2), sqrt(2)] - 1 and 2^r = 1 + r (E0 + E1 r + ...) on [-1/2, 1/2]:
# Chebyshev fits, relative errors 3e-8 and 5e-9.
L0, L1, L2, L3, L4 = F(1.4426950216), F(-0.7213473320), F(0.4809105992), F(-0.3607048392), F(0.2879183292)
L5, L6, L7, L8 = F(-0.2389203459), F(0.2156698555), F(-0.2074210346), F(0.1261484623)
E0, E1, E2, E3, E4, E5 = (
    F(0.6931471825),
    F(0.2402265072),
    F(0.0555035695),
    F(0.0096180569),
    F(0.0013390867),
    F(0.0001546145),
)
SQRT_HALF_BITS, MANTISSA, ONE_BITS = np.int32(0x3F3504F3), np.int32(0x007FFFFF), np.int32(0x3F800000)
HALF, ONE, LIMIT, ROUNDS_OFF = F(0.5), F(1), F(125), F(1.5 * 2**23)
FAST = {"contract", "nsz"}
"""What may be rearranged: fused multiply-adds, and the sign of zero; nothing about nan."""


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _fill(words, block, key, number):  # type: ignore[no-untyped-def]
    """words[l] = the Philox word of weight 1024 block + l."""
    low_key, high_key = key & WORD, key >> SHIFT
    for j in range(LANES):
        counter = np.uint64(block) * np.uint64(LANES) + np.uint64(j)
        c0, c1, c2, c3 = counter & WORD, counter >> SHIFT, number, np.uint64(0)
        k0, k1 = low_key, high_key
        for _ in range(ROUNDS):
            p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
            c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & WORD, (p0 >> SHIFT) ^ c3 ^ k1, p0 & WORD
            k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
        words[j], words[LANES + j] = np.uint32(c0), np.uint32(c1)
        words[2 * LANES + j], words[3 * LANES + j] = np.uint32(c2), np.uint32(c3)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _log2(x):  # type: ignore[no-untyped-def]
    """Binary logarithm of a positive normal float32, to about 1 ulp."""
    bits = np.int32(F(x).view(np.int32) - SQRT_HALF_BITS)
    exponent = F(np.int32(bits >> np.int32(23)))
    f = np.int32((bits & MANTISSA) + SQRT_HALF_BITS).view(np.float32) - ONE
    p = (((((((L8 * f + L7) * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    return exponent + f * p


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _exp2(x):  # type: ignore[no-untyped-def]
    """2^x of a float32 in [-125, 125], to about 1 ulp."""
    shifted = F(x + ROUNDS_OFF)  # x rounded to an integer, in the last bits
    r = x - (shifted - ROUNDS_OFF)
    p = ((((E5 * r + E4) * r + E3) * r + E2) * r + E1) * r + E0
    return (p * r + ONE) * np.int32((shifted.view(np.int32) << np.int32(23)) + ONE_BITS).view(np.float32)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _limited(x, low, high):  # type: ignore[no-untyped-def]
    """x limited to [low, high]; nan stays nan."""
    x = low if x < low else x
    return high if x > high else x


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _minus_x(words, s, out, inverse_temperature, eps):  # type: ignore[no-untyped-def]
    """out = -x log2 e, x = (log s - log(1 - s) + log u - log(1 - u)) / tau: (1 - m) / m is 2 to that power.

    Limited to [-125, 125]; nan where s is.
    """
    for i in range(len(s)):
        probability = _limited(s[i], eps, ONE - eps)
        out[i] = ((F(words[i]) + HALF) * probability) / ((F(np.uint32(~words[i])) + HALF) * (ONE - probability))
    for i in range(len(s)):
        ratio = out[i]
        # ratio - ratio is 0, and nan where ratio is: _log2 takes the bits of nan for a number.
        out[i] = _limited(_log2(ratio) * -inverse_temperature, -LIMIT, LIMIT) + (ratio - ratio)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def forward(w, s, out, first, end, key, number, inverse_temperature, eps):  # type: ignore[no-untyped-def]
    """out = w m on the blocks first .. end - 1."""
    words, power = np.empty(BLOCK, np.uint32), np.empty(BLOCK, F)
    for block in range(first, end):
        _fill(words, block, key, number)
        part = slice(block * BLOCK, min(block * BLOCK + BLOCK, w.size))
        w_, out_ = w[part], out[part]
        _minus_x(words, s[part], power, inverse_temperature, eps)
        for i in range(len(w_)):
            out_[i] = w_[i] / (ONE + _exp2(power[i]))


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def backward(g, w, s, grad_w, grad_s, first, end, key, number, inverse_temperature, eps):  # type: ignore[no-untyped-def]
    """grad_w = g m and grad_s = g w m (1 - m) / (tau s (1 - s)) on the blocks first .. end - 1."""
    words, power = np.empty(BLOCK, np.uint32), np.empty(BLOCK, F)
    for block in range(first, end):
        _fill(words, block, key, number)
        part = slice(block * BLOCK, min(block * BLOCK + BLOCK, w.size))
        g_, w_, s_, grad_w_, grad_s_ = g[part], w[part], s[part], grad_w[part], grad_s[part]
        _minus_x(words, s_, power, inverse_temperature, eps)
        for i in range(len(w_)):
            probability = _limited(s_[i], eps, ONE - eps)
            odds = _exp2(power[i])
            m = ONE / (ONE + odds)
            kept = g_[i] * m
            grad_w_[i] = kept
            grad_s_[i] = kept * w_[i] * (odds * m) * (inverse_temperature / (probability * (ONE - probability)))


def compile_all() -> None:
    """Compile the kernels (or load them from numba's cache) and run each once."""
    w, s = np.full(3, 2, F), np.full(3, 0.5, F)
    out, grad_w, grad_s = np.empty_like(w), np.empty_like(w), np.empty_like(w)
    key, number = np.uint64(0), np.uint64(0)
    forward(w, s, out, 0, 1, key, number, F(1), F(1e-6))
    backward(w, w, s, grad_w, grad_s, 0, 1, key, number, F(1), F(1e-6))
    # At s = 1/2 and tau = 1 the mask is u itself: Philox's published words for key 0, counters 0, 1 and 2.
    if not np.allclose(out[0], 2 * 0x6627E8D5 / 2**32, rtol=1e-6) or not np.array_equal(out, grad_w):
        raise RuntimeError("the compiled relaxed mask gives wrong numbers here")
