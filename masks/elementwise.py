"""How is a function of every element computed so that its bits do not depend on where slices are cut?

At the end of a vector torch's CPU code takes other functions, which round differently: vectors are filled up to whole
rows of vector registers. In chunks, which bound the temporary memory and stay in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ghostmask.engine.sharding.rules import LANES

CHUNK, CPU_CHUNK = 1 << 20, 1 << 14
"""Elements at a time. On the CPU torch gives less than 2^15 numbers to one thread."""


def elementwise(function: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    """(n,) function(*vectors), of vectors (n,) and of the first one's type; the function looks at no other element."""
    out = torch.empty_like(vectors[0])
    for chunk, parts in chunks(vectors):
        out[chunk] = function(*parts)[: chunk.stop - chunk.start]
    return out


def chunks(vectors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """(elements, these elements of the vectors, filled up with ones to whole rows) of one chunk after the other."""
    numel = len(vectors[0])
    step = CPU_CHUNK if vectors[0].device.type == "cpu" else CHUNK
    for start in range(0, numel, step):
        end = min(start + step, numel)
        yield slice(start, end), [pad(v[start:end], (0, (start - end) % LANES), value=1.0) for v in vectors]
