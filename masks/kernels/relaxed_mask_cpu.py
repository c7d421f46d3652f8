"""What does the relaxed mask do with a bucket of tensors on the CPU: numba kernels that release the interpreter lock.

The same numbers as masks.relaxed_mask_torch. A kernel gets a table of addresses, as on CUDA, and a range of the blocks
of all tensors laid end to end: one call per thread's share, not one per tensor. log2 and exp2 are polynomials, because
calls of libm would keep LLVM from vectorising the loops. A block goes through four short loops rather than one long
one: what depends on one another is then short enough for a processor to work on several rounds at once (a third less
time, measured).
"""

# mypy: disable-error-code="no-untyped-call,attr-defined"
from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from ghostmask.masks.kernels.compiled import split_over_threads
from ghostmask.masks.kernels.memory_order import filled, laid_out
from ghostmask.masks.kernels.noise import BLOCK, LANES, ROUNDS, NoiseKey, random_words

SMALLEST_RANGE = 16
"""Blocks of 1024 weights worth a thread of their own."""
SHARES = 4
"""Parts of a bucket per thread."""
TURNS = 8
"""Parts of a block in which the words of the next block and the results of this one take turns: the processor computes
words while it waits for memory (a tenth less time, measured)."""
PART, COUNTERS = BLOCK // TURNS, LANES // TURNS
"""Weights whose results, and counters whose words, are computed in a turn."""
WORD = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
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


def forward(weights: list[Tensor], probabilities: list[Tensor], outs: list[Tensor], key: Tensor, temperature: Tensor,
            number: int, eps: float) -> None:  # fmt: skip
    """out = w m of each tensor, the first of which is the `number`-th; out of any float type and memory order."""
    with filled(outs, weights) as targets:
        _run(_forward, [weights, probabilities, targets], targets, key, temperature, number, eps)


def backward(grads: list[Tensor], weights: list[Tensor], probabilities: list[Tensor], grads_w: list[Tensor],
             grads_s: list[Tensor], key: Tensor, temperature: Tensor, number: int, eps: float) -> None:  # fmt: skip
    """grad_w = g m and grad_s = g w m (1 - m) / (tau s (1 - s)) of each tensor; grad_w in the order of its weight."""
    with filled(grads_s, grads_w) as slopes:
        tensors = [grads, weights, probabilities, grads_w, slopes]
        _run(_backward, tensors, grads_w, key, temperature, number, eps)


def _run(
    kernel: Any,
    roles: list[list[Tensor]],
    like: list[Tensor],
    key: Tensor,
    temperature: Tensor,
    number: int,
    eps: float,
) -> None:
    """The kernel on all blocks of all tensors, laid end to end and shared between the threads."""
    held = [[laid_out(t, target) for t, target in zip(role, like, strict=True)] for role in roles]
    columns = [[t.numel() for t in like], *([t.data_ptr() for t in role] for role in held)]
    table = np.array(columns, np.int64).T.copy()
    bits, inverse = np.uint64(int(key) & 0xFFFFFFFFFFFFFFFF), F(1 / float(temperature))

    def work(first: int, end: int) -> None:
        kernel(table, first, end, bits, number, inverse, F(eps))

    blocks = sum(-(-t.numel() // BLOCK) for t in like)
    split_over_threads(work, blocks, SMALLEST_RANGE, shares=SHARES)


def _generate_pointer(typingctx, address):  # type: ignore[no-untyped-def]
    """A pointer to float32 from its address as an integer."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), generate


_pointer: Any = intrinsic(_generate_pointer)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _vector(table, row, role):  # type: ignore[no-untyped-def]
    """The float32 vector of that role of a tensor."""
    return numba.carray(_pointer(table[row, role]), table[row, 0], np.float32)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _fill(words, turn, block, key, number):  # type: ignore[no-untyped-def]
    """words[l] = the Philox word of weight 1024 block + l, for an eighth of the block's counters."""
    low_key, high_key = key & WORD, key >> SHIFT
    first = np.uint64(turn) * np.uint64(COUNTERS)  # unsigned: a negative index would keep LLVM from vectorising
    for j in range(COUNTERS):
        place = first + np.uint64(j)
        counter = np.uint64(block) * np.uint64(LANES) + place
        c0, c1, c2, c3 = counter & WORD, counter >> SHIFT, number, np.uint64(0)
        k0, k1 = low_key, high_key
        for _ in range(ROUNDS):
            p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
            c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & WORD, (p0 >> SHIFT) ^ c3 ^ k1, p0 & WORD
            k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
        words[place], words[place + np.uint64(LANES)] = np.uint32(c0), np.uint32(c1)
        words[place + np.uint64(2 * LANES)], words[place + np.uint64(3 * LANES)] = np.uint32(c2), np.uint32(c3)


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
def _minus_x(words, whole, out, block, is_first, key, number, inverse_temperature, eps):  # type: ignore[no-untyped-def]
    """out = -x log2 e, x = (log s - log(1 - s) + log u - log(1 - u)) / tau: (1 - m) / m is 2 to that power.

    Limited to [-125, 125]; nan where s, the block's part of the whole tensor's, is. words: the block's, unless it is
    the first of a range.
    """
    if is_first:
        for turn in range(TURNS):
            _fill(words, turn, block, key, number)
    s = whole[block * BLOCK : block * BLOCK + BLOCK]
    for i in range(len(s)):
        probability = _limited(s[i], eps, ONE - eps)
        out[i] = ((F(words[i]) + HALF) * probability) / ((F(np.uint32(~words[i])) + HALF) * (ONE - probability))
    for i in range(len(s)):
        ratio = out[i]
        # ratio - ratio is 0, and nan where ratio is: _log2 takes the bits of nan for a number.
        out[i] = _limited(_log2(ratio) * -inverse_temperature, -LIMIT, LIMIT) + (ratio - ratio)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _masked(w, power, out):  # type: ignore[no-untyped-def]
    for i in range(len(w)):
        out[i] = w[i] / (ONE + _exp2(power[i]))


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _gradients(g, w, s, power, grad_w, grad_s, inverse_temperature, eps):  # type: ignore[no-untyped-def]
    for i in range(len(w)):
        probability = _limited(s[i], eps, ONE - eps)
        odds = _exp2(power[i])
        m = ONE / (ONE + odds)
        kept = g[i] * m
        grad_w[i] = kept
        grad_s[i] = kept * w[i] * (odds * m) * (inverse_temperature / (probability * (ONE - probability)))


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _forward(table, first, end, key, number, inverse_temperature, eps):  # type: ignore[no-untyped-def]
    """out = w m on the blocks first .. end - 1; table: a row (numel, addresses of w, s, out) for each tensor."""
    words, power = np.empty(BLOCK, np.uint32), np.empty(BLOCK, F)
    start = 0
    for row in range(len(table)):
        w, s, out = _vector(table, row, 1), _vector(table, row, 2), _vector(table, row, 3)
        tensor, blocks = np.uint64(number + row), -(-w.size // BLOCK)
        low = max(first - start, 0)
        for block in range(low, min(end - start, blocks)):
            _minus_x(words, s, power, block, block == low, key, tensor, inverse_temperature, eps)
            for turn in range(TURNS):
                _fill(words, turn, block + 1, key, tensor)
                part = slice(block * BLOCK + turn * PART, block * BLOCK + turn * PART + PART)
                _masked(w[part], power[turn * PART :], out[part])
        start += blocks


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _backward(table, first, end, key, number, inverse_temperature, eps):  # type: ignore[no-untyped-def]
    """grad_w = g m and grad_s = g w m (1 - m) / (tau s (1 - s)) on the blocks first .. end - 1.

    table: a row (numel, addresses of g, w, s, grad_w, grad_s) for each tensor.
    """
    words, power = np.empty(BLOCK, np.uint32), np.empty(BLOCK, F)
    start = 0
    for row in range(len(table)):
        g, w, s = _vector(table, row, 1), _vector(table, row, 2), _vector(table, row, 3)
        grad_w, grad_s = _vector(table, row, 4), _vector(table, row, 5)
        tensor, blocks = np.uint64(number + row), -(-w.size // BLOCK)
        low = max(first - start, 0)
        for block in range(low, min(end - start, blocks)):
            _minus_x(words, s, power, block, block == low, key, tensor, inverse_temperature, eps)
            for turn in range(TURNS):
                _fill(words, turn, block + 1, key, tensor)
                part = slice(block * BLOCK + turn * PART, block * BLOCK + turn * PART + PART)
                _gradients(
                    g[part], w[part], s[part], power[turn * PART :], grad_w[part], grad_s[part],
                    inverse_temperature, eps,
                )  # fmt: skip
        start += blocks


def compile_all() -> None:
    """Compile the kernels (or load them from numba's cache, which does not see changes of masks.kernels.noise) and compare a
    tensor of 1500 weights with the noise they should have."""
    w, s = torch.full((1500,), 2.0), torch.full((1500,), 0.5)
    out, grad_w, grad_s = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w)
    key, temperature = NoiseKey(0, 0, 0, 0).tensor(), torch.ones(())
    forward([w], [s], [out], key, temperature, 3, 1e-6)
    backward([w], [w], [s], [grad_w], [grad_s], key, temperature, 3, 1e-6)
    # At s = 1/2 and tau = 1 the mask is u itself.
    expected = 2 * (random_words(key, 3, 0, 1500).float() + 0.5) / 2**32
    if not torch.allclose(out, expected, rtol=1e-5) or not torch.equal(out, grad_w):
        raise RuntimeError("the compiled relaxed mask gives wrong numbers here")
