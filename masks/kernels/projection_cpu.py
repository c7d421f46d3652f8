"""What does the projection do with a run of probabilities on the CPU: numba kernels that release the interpreter lock.

A chunk at a time: one loop that LLVM vectorises prepares bins, a second adds to the tables. Four tables take turns, for
neighbours fall into the same bin, and an addition would wait for the one before it to reach the cache.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

F = np.float32
LARGEST, ZERO, ONE = F(2.0**24), F(0), F(1)
EXPONENT = np.uint32(0x7F800000)
NOWHERE = np.uint32(0xFFFFFFFF)
CHUNK = 1024
SECTION = 1 << 18
"""Elements after which the packed tables are emptied: their remainders, below 2^20 each, sum to less than 2^40."""
PACK = np.int64(40)
UNIT = np.int64(1) << PACK
DITHER = np.uint64((1 << 29) - 1)
DITHER_SHIFT = np.uint64(35)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LANES = 16
COMPRESSES = bool(binding.get_host_cpu_features().get("avx512f", False))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _image(x):  # type: ignore[no-untyped-def]
    """Bits of a positive float32; above all others where x <= 0 or nan."""
    bits = F(min(x, LARGEST)).view(np.uint32)
    return bits if x > ZERO else NOWHERE


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _add(tables, place, rest, count):  # type: ignore[no-untyped-def]
    """tables[., place] += (1, rest), packed into one int64."""
    t0, t1, t2, t3 = tables[0], tables[1], tables[2], tables[3]
    whole = count - count % 4
    for j in range(0, whole, 4):
        t0[place[j]] += UNIT + np.int64(rest[j])
        t1[place[j + 1]] += UNIT + np.int64(rest[j + 1])
        t2[place[j + 2]] += UNIT + np.int64(rest[j + 2])
        t3[place[j + 3]] += UNIT + np.int64(rest[j + 3])
    for j in range(whole, count):
        t0[place[j]] += UNIT + np.int64(rest[j])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def histogram(z, first, end, base, shift, bins, table, packed):  # type: ignore[no-untyped-def]
    """Add the breakpoints z of a range, less those of z - 1, to an int64 (2, bins + 1): counts and remainders.

    packed: zeros, int64 (2, 4, bins + 1), and zeros again afterwards. Bin j holds the positive float32 numbers whose
    bits >> shift are base + j; the remainder is the lower `shift` bits (at most 20). Counts have one more column: the
    number of elements that are not finite.
    """
    place, rest = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    marked, above = np.empty(CHUNK, np.uint8), np.empty(CHUNK, F)
    shift_, low_bits, base_, bins_ = np.uint32(shift), np.uint32((1 << shift) - 1), np.uint32(base), np.uint32(bins)
    for section in range(first, end, SECTION):
        for start in range(section, min(section + SECTION, end), CHUNK):
            part = z[start : min(start + CHUNK, end)]
            bad, found = np.int32(0), np.uint8(0)
            for i in range(len(part)):
                bad += np.int32((F(part[i]).view(np.uint32) & EXPONENT) == EXPONENT)
                bits = _image(part[i])
                place[i] = min(np.uint32((bits >> shift_) - base_), bins_)
                rest[i] = bits & low_bits
                marked[i] = np.uint8(part[i] > ONE)
                found |= marked[i]
            table[0, bins] += bad
            _add(packed[0], place, rest, len(part))
            if found:
                count = _append(part, marked, above, np.int64(0))
                for i in range(count):
                    bits = _image(F(min(above[i], LARGEST) - ONE))
                    place[i] = min(np.uint32((bits >> shift_) - base_), bins_)
                    rest[i] = bits & low_bits
                _add(packed[1], place, rest, count)
        for j in range(bins):
            for turn in range(4):
                plus, minus = packed[0, turn, j], packed[1, turn, j]
                table[0, j] += (plus >> PACK) - (minus >> PACK)
                table[1, j] += (plus & (UNIT - 1)) - (minus & (UNIT - 1))
        packed[:] = 0


@numba.njit(nogil=True, cache=True, error_model="numpy")
def select(z, first, end, low, width, out, count):  # type: ignore[no-untyped-def]
    """Copy the elements of a range with a breakpoint whose bits are in [low, low + width) to `out`, from `count` on.

    Returns the new count, or -1 where `out` is too short.
    """
    inside = np.empty(CHUNK, np.uint8)
    low_, width_ = np.uint32(low), np.uint32(width)
    for start in range(first, end, CHUNK):
        part = z[start : min(start + CHUNK, end)]
        found = np.uint8(0)
        for i in range(len(part)):
            own = np.uint32(_image(part[i]) - low_) < width_
            below = np.uint32(_image(F(min(part[i], LARGEST) - ONE)) - low_) < width_
            inside[i] = np.uint8(own | below)
            found |= inside[i]
        if found:
            if count + len(part) > len(out):
                return -1
            count = _append(part, inside, out, count)
    return count


def narrow(tables: Tensor, shift: int, *brackets: Tensor) -> None:
    """See `masks.kernels.projection.Brackets.narrow`; brackets: its fields."""
    _narrow(tables.numpy(), shift, *(field.numpy() for field in brackets))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _narrow(tables, shift, budget, base, slope, value, lowest):  # type: ignore[no-untyped-def]
    bins = tables.shape[2] - 1
    for row in range(len(tables)):
        first, above, found = base[row] * bins, slope[row], False
        upper, risen, edge = value[row], 0.0, 0.0
        for j in range(bins, -1, -1):
            low = np.float64(np.int32((first + j) << shift).view(F))
            if j < bins:
                rise = above * (edge - low) + tables[row, 1, j] * ((edge - low) / (1 << shift))
                if not found and (upper + (risen + rise) > budget[row] or j == 0):
                    base[row], slope[row], value[row], found = first + j, above, upper + risen, True
                above += tables[row, 0, j]
                risen += rise
            edge = low
        lowest[row] = upper + risen


@numba.njit(nogil=True, cache=True, error_model="numpy")
def subtract_and_clamp(z, first, end, threshold, first_index):  # type: ignore[no-untyped-def]
    """z[first:end] = clamp(z - threshold, 0, 1), rounded to float32 by the dither of `subtract_and_clamp_`."""
    part, start = z[first:end], (np.uint64(first_index) + np.uint64(first)) * GOLDEN
    for i in range(len(part)):
        y = np.float64(min(part[i], LARGEST)) - threshold
        y = 0.0 if y < 0.0 else y
        y = 1.0 if y > 1.0 else y
        dither = (start + np.uint64(i) * GOLDEN) >> DITHER_SHIFT
        part[i] = F(np.uint64((np.float64(y).view(np.uint64) + dither) & ~DITHER).view(np.float64))


def _generate_compress(typingctx, values, marked, start, out, count):  # type: ignore[no-untyped-def]
    """_append's work on 16 elements from `start` on, by AVX-512's compress instruction; the number of marked ones."""
    signature = types.int64(values, marked, types.int64, out, types.int64)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointers = [context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 1, 3)]
        lanes = ir.VectorType(ir.IntType(32), LANES)
        byte_lanes, bit_lanes = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(ir.IntType(1), LANES)
        address = lambda number, index, to: builder.bitcast(  # noqa: E731
            builder.gep(pointers[number], [arguments[index]]), to.as_pointer()
        )
        loaded = builder.load(address(0, 2, lanes))
        marks = builder.load(address(1, 2, byte_lanes))
        loaded.align, marks.align = 4, 1
        mask = builder.icmp_unsigned("!=", marks, ir.Constant(byte_lanes, [0] * LANES))
        kind = ir.FunctionType(lanes, [lanes, bit_lanes, lanes])
        compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.experimental.vector.compress.v16i32")
        first = builder.call(compress, [loaded, mask, ir.Constant(lanes, ir.Undefined)])
        # All 16 lanes: the instruction that stores the marked ones only takes 20 times as long on a Zen 4.
        builder.store(first, address(2, 4, lanes)).align = 4
        return builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(LANES))), ir.IntType(64))

    return signature, generate


_compress: Any = intrinsic(_generate_compress)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _append(values, marked, out, count):  # type: ignore[no-untyped-def]
    """Write values[i] (float32) where marked[i] (uint8) is not 0 to out[count:], in order; returns the new count.

    Without a branch per element. out may be overwritten as far as count + len(values).
    """
    done = 0
    if COMPRESSES:
        done = len(values) // LANES * LANES
        for start in range(0, done, LANES):
            count += _compress(values, marked, start, out, count)
    for i in range(done, len(values)):
        out[count] = values[i]  # what is not marked is overwritten by the next
        count += np.int64(marked[i] != 0)
    return count


def compile_all() -> None:
    """Compile the kernels (or load them from numba's cache) and run each once."""
    z, out = np.array([0.5, 1.5, -1.0], F), np.empty(CHUNK, F)
    table, scratch = np.zeros((2, 1217), np.int64), np.zeros((2, 4, 1217), np.int64)
    histogram(z, 0, 3, 0, 20, 1216, table, scratch)
    number = select(z, 0, 3, int(F(0.5).view(np.int32)), 1, out, 0)
    subtract_and_clamp(z, 0, 3, 0.25, 0)
    fields = [torch.zeros(1, dtype=dtype) for dtype in (torch.float64, torch.int64, torch.int64, *2 * (torch.float64,))]
    narrow(torch.from_numpy(table)[None], 20, *fields)
    if (table.sum(), number, out[1], z.tolist(), int(fields[1])) != (1, 2, 1.5, [0.25, 1.0, 0.0], 1019):
        raise RuntimeError("the compiled projection gives wrong numbers here")
