"""What does the projection do with a piece of a shard on the CPU: numba kernels that release the interpreter lock."""

from __future__ import annotations

import numba
import numpy as np

LARGEST = np.float32(2.0**24)
EXPONENT = np.int32(0x7F800000)
DITHER = np.uint64((1 << 29) - 1)
DITHER_SHIFT = np.uint64(35)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@numba.njit(nogil=True, cache=True)
def clamped_sum(z, first, end, scale):  # type: ignore[no-untyped-def]
    """(fixed-point sum of clamp(z, 0, 1), number of elements that are not finite) of z[first:end]."""
    total, bad = np.int64(0), np.int64(0)
    for i in range(first, end):
        bad += np.int64((np.float32(z[i]).view(np.int32) & EXPONENT) == EXPONENT)
        total += np.int64(min(max(z[i], np.float32(0)), np.float32(1)) * scale + 0.5)
    return total, bad


@numba.njit(nogil=True, cache=True)
def histogram(z, first, end, base, shift, bins):  # type: ignore[no-untyped-def]
    """int64 (2, bins): counts and remainders of the breakpoints z less those of the breakpoints z - 1 of z[first:end].

    Bin j holds the positive float32 numbers whose bits >> shift are base + j; the remainder is the lower `shift` bits.
    """
    table = np.zeros((2, bins), np.int64)
    rest = np.int32((1 << shift) - 1)
    for i in range(first, end):
        if z[i] > 0:
            limited = min(z[i], LARGEST)
            bits = np.float32(limited).view(np.int32)
            place = (bits >> shift) - base
            if 0 <= place < bins:
                table[0, place] += 1
                table[1, place] += bits & rest
            if limited > 1:
                bits = np.float32(limited - np.float32(1)).view(np.int32)
                place = (bits >> shift) - base
                if 0 <= place < bins:
                    table[0, place] -= 1
                    table[1, place] -= bits & rest
    return table


@numba.njit(nogil=True, cache=True)
def subtract_and_clamp(z, first, end, threshold, first_index):  # type: ignore[no-untyped-def]
    """z[first:end] = clamp(z - threshold, 0, 1), rounded to float32 by the dither of masks.projection."""
    for i in range(first, end):
        y = min(max(np.float64(min(z[i], LARGEST)) - threshold, 0.0), 1.0)
        dither = ((np.uint64(first_index) + np.uint64(i)) * GOLDEN >> DITHER_SHIFT) & DITHER
        z[i] = np.float32(np.uint64((np.float64(y).view(np.uint64) + dither) & ~DITHER).view(np.float64))


def compile_all() -> None:
    """Compile the kernels (or load them from numba's cache) and run each once."""
    z = np.array([0.5, 1.5, -1.0], np.float32)
    total, bad = clamped_sum(z, 0, 3, 2.0)
    table = histogram(z, 0, 3, 0, 20, 1216)
    subtract_and_clamp(z, 0, 3, 0.25, 0)
    if (total, bad, table.sum(), z.tolist()) != (3, 0, 1, [0.25, 1.0, 0.0]):
        raise RuntimeError("the compiled projection gives wrong numbers here")
