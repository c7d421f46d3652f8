"""What does the projection do with a run of probabilities on CUDA: Triton kernels.

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
ROWS, COLUMNS = 64, 16
"""Tables, and bins of each, that a program adds up at once."""
MOST = 1 << 19
"""Elements per program: its remainders, below 2^20 each, sum to less than 2^39."""
PACK = tl.constexpr(40)
UNIT = tl.constexpr(1 << 40)
HALF = tl.constexpr(1 << 39)
LARGEST = tl.constexpr(2.0**24)
EXPONENT = tl.constexpr(0x7F800000)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
DITHER = tl.constexpr((1 << 29) - 1)


def histogram(z: Tensor, base: Tensor, shift: int, bins: int) -> Tensor:
    """int64 (2, bins + 1): see `masks.kernels.projection.Breakpoints.table`."""
    programs = min(max(PROGRAMS, triton.cdiv(z.numel(), MOST)), triton.cdiv(z.numel(), BLOCK))
    blocks = triton.cdiv(z.numel(), BLOCK * programs)
    packed = torch.zeros(programs, bins + 1, dtype=torch.int64, device=z.device)
    _histogram[(programs,)](z, z.numel(), base, packed, blocks, bins, shift, BLOCK)
    table = torch.empty(2, bins + 1, dtype=torch.int64, device=z.device)
    _add_up[(triton.cdiv(bins + 1, COLUMNS),)](packed, programs, table, bins + 1, ROWS, COLUMNS)
    return table


def narrow(tables: Tensor, shift: int, *brackets: Tensor) -> None:
    """See `masks.kernels.projection.Brackets.narrow`; brackets: its fields."""
    bins = tables.shape[2] - 1
    _narrow[(len(tables),)](tables, bins, *brackets, shift, triton.next_power_of_2(bins))


def subtract_and_clamp(z: Tensor, threshold: Tensor, first_index: int) -> None:
    """z = clamp(z - threshold, 0, 1), rounded to float32 by the dither of masks.kernels.projection."""
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


@triton.jit(do_not_specialize=["programs", "columns"])  # type: ignore[untyped-decorator]
def _add_up(packed, programs, table, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """table (2, columns) = sums over the programs of the counts and the remainders that are packed in their tables."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    counts, remainders = tl.zeros((COLUMNS,), tl.int64), tl.zeros((COLUMNS,), tl.int64)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < programs)[:, None] & (column < columns)[None, :]
        both = tl.load(packed + row[:, None] * columns + column[None, :], mask=inside, other=0)
        count = (both + HALF) >> PACK
        counts += tl.sum(count, 0)
        remainders += tl.sum(both - (count << PACK), 0)
    tl.store(table + column, counts, mask=column < columns)
    tl.store(table + columns + column, remainders, mask=column < columns)


@triton.jit(do_not_specialize=["bins"])  # type: ignore[untyped-decorator]
def _narrow(tables, bins, budget, base, slope, value, lowest, SHIFT: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    # From the uppermost bin down, so that what lies above a bin is a cumulative sum.
    j = bins - 1 - tl.arange(0, SIZE)
    inside = j >= 0
    counts = tl.load(tables + row * 2 * (bins + 1) + j, mask=inside, other=0)
    remainders = tl.load(tables + (row * 2 + 1) * (bins + 1) + j, mask=inside, other=0)
    image = tl.load(base + row) * bins + j
    low, high = _float(tl.where(inside, image << SHIFT, 0)), _float(tl.where(inside, (image + 1) << SHIFT, 0))
    above = tl.load(slope + row) + tl.cumsum(counts, 0) - counts
    width = high - low
    rises = above.to(tl.float64) * width + remainders.to(tl.float64) * (width / (1 << SHIFT))
    upper, wanted = tl.load(value + row), tl.load(budget + row)
    values = upper + tl.cumsum(rises, 0)
    place = tl.maximum(tl.sum((inside & (values > wanted)).to(tl.int32), 0) - 1, 0)
    mine, next_above = inside & (j == place), inside & (j == place + 1)
    tl.store(base + row, tl.sum(tl.where(mine, image, 0), 0))
    tl.store(slope + row, tl.sum(tl.where(mine, above, 0), 0))
    edge = tl.sum(tl.where(next_above, values, 0.0), 0)
    tl.store(value + row, tl.where(place == bins - 1, upper, edge))
    tl.store(lowest + row, tl.sum(tl.where(j == 0, values, 0.0), 0))


@triton.jit
def _float(image):  # type: ignore[no-untyped-def]
    return image.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)


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
    """Compile the kernels, those that depend on the round for each of its rounds, and run each once."""
    from ghostmask.masks.kernels.projection import ROUNDS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    z = torch.tensor([0.5, 1.5, -1.0], device=device)
    base, slope = torch.zeros(2, 1, dtype=torch.int64, device=device)
    budget, value, lowest = torch.zeros(3, 1, dtype=torch.float64, device=device)
    counts = []
    for shift, bins in ROUNDS:
        tables = histogram(z, base[0] * bins, shift, bins)[None]
        narrow(tables, shift, budget, base, slope, value, lowest)
        counts.append(int(tables[0, 0].sum()))
    subtract_and_clamp(z, value[0] + 0.25, 0)
    # The budget is 0: the threshold is 1.5, the largest breakpoint, at the upper end of the bins that lead to it.
    if (counts, int(base), z.tolist()) != ([1, 0, 0], 0x3FC00000 - 1, [0.25, 1.0, 0.0]):
        raise RuntimeError("the compiled projection gives wrong numbers here")
