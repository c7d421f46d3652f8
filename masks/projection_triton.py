"""What does the projection do with a piece of a shard on CUDA: Triton kernels.

The histogram is counted by many programs, each into a table of its own: probabilities crowd in few bins (in one, when a
run starts), and one table's bins would be a queue for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements a program loads at once."""
PROGRAMS = 528
"""Programs, and tables, of the histogram unless a table would overflow: four per multiprocessor of an H100."""
MOST = 1 << 19
"""Elements per program: its remainders, below 2^20 each, sum to less than 2^39."""
PACK = tl.constexpr(40)
UNIT = tl.constexpr(1 << 40)
LARGEST = tl.constexpr(2.0**24)
EXPONENT = tl.constexpr(0x7F800000)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
DITHER = tl.constexpr((1 << 29) - 1)


def histogram(z: Tensor, base: Tensor, shift: int, bins: int) -> Tensor:
    """int64 (2, bins + 1): see `masks.projection_passes.Breakpoints.table`."""
    programs = min(max(PROGRAMS, triton.cdiv(z.numel(), MOST)), triton.cdiv(z.numel(), BLOCK))
    blocks = triton.cdiv(z.numel(), BLOCK * programs)
    packed = torch.zeros(programs, bins + 1, dtype=torch.int64, device=z.device)
    _histogram[(programs,)](z, z.numel(), base, packed, blocks, bins, shift, BLOCK)
    half = 1 << (PACK.value - 1)
    counts = (packed + half) >> PACK.value
    return torch.stack([counts.sum(0), (packed - (counts << PACK.value)).sum(0)])


def subtract_and_clamp(z: Tensor, threshold: Tensor, first_index: int) -> None:
    """z = clamp(z - threshold, 0, 1), rounded to float32 by the dither of masks.projection_passes."""
    _subtract_and_clamp[(triton.cdiv(z.numel(), BLOCK),)](z, z.numel(), threshold, first_index, BLOCK)


@triton.jit(do_not_specialize=["blocks", "bins"])  # type: ignore[untyped-decorator]
def _histogram(z, numel, base, tables, blocks, bins, SHIFT: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    table, first = tables + program * (bins + 1), tl.load(base)
    start, bad = program * blocks * SIZE, tl.zeros((SIZE,), tl.int64)
    for number in range(blocks):
        i = start + number * SIZE + tl.arange(0, SIZE)
        x = tl.load(z + i, mask=i < numel, other=0.0)
        bad += ((x.to(tl.int32, bitcast=True) & EXPONENT) == EXPONENT).to(tl.int64)
        x = tl.where(x > LARGEST, LARGEST, x)
        _count(table, x, 1, first, bins, SHIFT)
        _count(table, x - 1.0, -1, first, bins, SHIFT)
    tl.store(table + bins, tl.sum(bad, 0) * UNIT)


@triton.jit  # type: ignore[untyped-decorator]
def _count(table, x, SIGN: tl.constexpr, first, bins, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """table[bin of x] += SIGN x (1, remainder), packed into one int64, for the breakpoints x above 0."""
    bits = x.to(tl.int32, bitcast=True)
    place = (bits >> SHIFT).to(tl.int64) - first
    packed = (bits & ((1 << SHIFT) - 1)).to(tl.int64) + UNIT
    inside = (x > 0) & (place >= 0) & (place < bins)
    tl.atomic_add(table + place, SIGN * packed, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["first_index"])  # type: ignore[untyped-decorator]
def _subtract_and_clamp(z, numel, threshold, first_index, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(z + i, mask=i < numel, other=0.0)
    y = tl.where(x > LARGEST, LARGEST, x).to(tl.float64) - tl.load(threshold)
    y = tl.where(y < 0, 0.0, y)  # not maximum: nan stays nan
    y = tl.where(y > 1, 1.0, y)
    dither = (((i + first_index) * GOLDEN) >> 35) & DITHER
    bits = (y.to(tl.int64, bitcast=True) + dither) & (-1 - DITHER)
    tl.store(z + i, bits.to(tl.float64, bitcast=True).to(tl.float32), mask=i < numel)


def compile_all() -> None:
    """Compile the kernels and run each once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    z, zero = torch.tensor([0.5, 1.5, -1.0], device=device), torch.zeros((), dtype=torch.int64, device=device)
    tables = [histogram(z, zero * base, shift, bins) for base, shift, bins in ((0, 20, 1216), (0, 10, 1024), (0, 0, 4))]
    subtract_and_clamp(z, zero.double() + 0.25, 0)
    if ([int(t[0].sum()) for t in tables], z.tolist()) != ([1, 0, 0], [0.25, 1.0, 0.0]):
        raise RuntimeError("the compiled projection gives wrong numbers here")
