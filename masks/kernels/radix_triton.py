"""How does the radix search count its keys on CUDA: a Triton kernel.

Programs count into several tables, as many as fit into a few megabytes: scores crowd in few bins, and one table's bins
would be a queue for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements a program loads at once."""
PROGRAMS = 528
"""Four per multiprocessor of an H100."""
CELLS = 1 << 22
"""Bins of all tables together: 16 MB."""


def count(keys: Tensor, numbers: Tensor | None, bases: Tensor, shift: int, bins: int) -> Tensor:
    """int64 (groups, bins): of each group, the keys with key >> shift = base + j.

    keys: (n,) int32 or int64, n at least 1; numbers: int64 (n,), their groups, None where there is one; bases: int64
    (groups,).
    """
    groups, numel = len(bases), keys.numel()
    programs = min(PROGRAMS, triton.cdiv(numel, BLOCK))
    tables = torch.zeros(
        min(programs, max(1, CELLS // (groups * bins))), groups, bins, dtype=torch.int32, device=keys.device
    )
    several, blocks = numbers is not None, triton.cdiv(numel, BLOCK * programs)
    _count[(programs,)](
        keys, numbers if several else keys, numel, bases, tables, len(tables), groups * bins, blocks, bins, shift,
        several, BLOCK,
    )  # fmt: skip
    return tables.sum(0)


@triton.jit(do_not_specialize=["num_tables", "cells", "blocks", "bins"])  # type: ignore[untyped-decorator]
def _count(  # type: ignore[no-untyped-def]
    keys, numbers, numel, bases, tables, num_tables, cells, blocks, bins, SHIFT: tl.constexpr, SEVERAL: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    table, start = tables + (program % num_tables) * cells, program * blocks * SIZE
    for number in range(blocks):
        i = start + number * SIZE + tl.arange(0, SIZE)
        inside = i < numel
        group = tl.zeros((SIZE,), tl.int64)
        if SEVERAL:
            group += tl.load(numbers + i, mask=inside, other=0)
        key = tl.load(keys + i, mask=inside, other=0).to(tl.int64)
        place = (key >> SHIFT) - tl.load(bases + group, mask=inside, other=0)
        inside = inside & (place >= 0) & (place < bins)
        tl.atomic_add(table + group * bins + place, 1, mask=inside, sem="relaxed")


def compile_all() -> None:
    """Compile the kernels of both types of keys for every round, of one group and of several, and run each once."""
    from ghostmask.masks.scoring.radix import rounds

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for integer in (torch.int32, torch.int64):
        keys = torch.tensor([0, 3, -1, 3], dtype=integer, device=device)
        numbers = torch.tensor([0, 1, 1, 1], device=device)
        for shift, bins in rounds(torch.iinfo(integer).bits, 11):
            bases = torch.full((2,), 3 >> shift, device=device)
            found = count(keys, numbers, bases, shift, bins), count(keys, None, bases[:1], shift, bins)
            expected = ([1 if shift > 1 else 0, 2], [3 if shift > 1 else 2])
            if ([int(t[0]) for t in found[0]], [int(t[0]) for t in found[1]]) != expected:
                raise RuntimeError(f"the compiled top-k gives wrong numbers here: {shift} {found}")
