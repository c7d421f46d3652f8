"""What does the relaxed mask do with one tensor on the CPU: numba kernels that release the interpreter lock.

The same numbers as the torch form in masks.relaxed_mask. log and exp are polynomials (Cephes), because calls of libm
would keep LLVM from vectorising the loops.
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
L0, L1, L2, L3, L4 = (
    F(7.0376836292e-2),
    F(-1.1514610310e-1),
    F(1.1676998740e-1),
    F(-1.2420140846e-1),
    F(1.4249322787e-1),
)
L5, L6, L7, L8 = F(-1.6668057665e-1), F(2.0000714765e-1), F(-2.4999993993e-1), F(3.3333331174e-1)
E0, E1, E2 = F(1.9875691500e-4), F(1.3981999507e-3), F(8.3334519073e-3)
E3, E4, E5 = F(4.1665795894e-2), F(1.6666665459e-1), F(5.0000001201e-1)
LN2_HIGH, LN2_LOW, LOG2_E = F(0.693359375), F(-2.12194440e-4), F(1.44269504088896341)
SQRT_HALF_BITS, MANTISSA, ONE_BITS = np.int32(0x3F3504F3), np.int32(0x007FFFFF), np.int32(0x3F800000)
HALF, ONE, LIMIT = F(0.5), F(1), F(87)
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
def _log(x):  # type: ignore[no-untyped-def]
    """Natural logarithm of a positive normal float32, to about 1 ulp."""
    bits = F(x).view(np.int32) - SQRT_HALF_BITS
    exponent = F(np.int32(bits) >> np.int32(23))
    f = np.int32((bits & MANTISSA) + SQRT_HALF_BITS).view(np.float32) - ONE
    p = (((((((L0 * f + L1) * f + L2) * f + L3) * f + L4) * f + L5) * f + L6) * f + L7) * f + L8
    square = f * f
    return f + (p * f * square + exponent * LN2_LOW - HALF * square) + exponent * LN2_HIGH


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _exp(x):  # type: ignore[no-untyped-def]
    """exp of a float32 in [-87, 87], to about 1 ulp."""
    n = F(np.floor(x * LOG2_E + HALF))
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    return (p * r * r + r + ONE) * np.int32((np.int32(n) << np.int32(23)) + ONE_BITS).view(np.float32)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _inverse_odds(word, s, inverse_temperature):  # type: ignore[no-untyped-def]
    """exp(-x), x = (log s - log(1 - s) + log u - log(1 - u)) / tau limited to +-87."""
    ratio = ((F(word) + HALF) * s) / ((F(~np.uint32(word) & np.uint32(WORD)) + HALF) * (ONE - s))
    x = _log(ratio) * inverse_temperature
    # s - s is 0, and nan where s is: _log takes the bits of nan for a number.
    return _exp(-_limited(x, -LIMIT, LIMIT)) + (s - s)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _limited(x, low, high):  # type: ignore[no-untyped-def]
    """x limited to [low, high]; nan stays nan."""
    x = low if x < low else x
    return high if x > high else x


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def forward(w, s, out, first, end, key, number, inverse_temperature, eps):  # type: ignore[no-untyped-def]
    """out = w m on the blocks first .. end - 1."""
    words = np.empty(BLOCK, np.uint32)
    for block in range(first, end):
        _fill(words, block, key, number)
        part = slice(block * BLOCK, min(block * BLOCK + BLOCK, w.size))
        w_, s_, out_ = w[part], s[part], out[part]
        for i in range(len(w_)):
            probability = _limited(s_[i], eps, ONE - eps)
            out_[i] = w_[i] / (ONE + _inverse_odds(words[i], probability, inverse_temperature))


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def backward(g, w, s, grad_w, grad_s, first, end, key, number, inverse_temperature, eps):  # type: ignore[no-untyped-def]
    """grad_w = g m and grad_s = g w m (1 - m) / (tau s (1 - s)) on the blocks first .. end - 1."""
    words = np.empty(BLOCK, np.uint32)
    for block in range(first, end):
        _fill(words, block, key, number)
        part = slice(block * BLOCK, min(block * BLOCK + BLOCK, w.size))
        g_, w_, s_, grad_w_, grad_s_ = g[part], w[part], s[part], grad_w[part], grad_s[part]
        for i in range(len(w_)):
            probability = _limited(s_[i], eps, ONE - eps)
            odds = _inverse_odds(words[i], probability, inverse_temperature)
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
