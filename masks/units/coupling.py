"""Which channels are removed together, and which rows and columns of which weights go with each?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghostmask.engine.errors import bad_value
from ghostmask.masks.units.tracing import Tracer, traced


@dataclass(frozen=True)
class Coupling:
    """The channels of a network, numbered 0 ... count - 1; number `count` stands for all that are never removed.

    rows, columns: by weight name the numbers of its output channels, and of its input channels (of a linear layer
    behind a convolution: each pixel's), None where these are its outputs (depthwise). vectors: by name the numbers of
    what else has a value per channel: batch norm's parameters and statistics, biases. origins: (count,) the number of
    the first weight that makes the channel.
    """

    count: int
    rows: dict[str, Tensor]
    columns: dict[str, Tensor | None]
    vectors: dict[str, Tensor]
    origins: Tensor


def coupling(net: nn.Module, weights: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> Coupling:
    """How the channels of a mask-free network hang together; weights: those that may be pruned.

    What a weight that may not be pruned makes or takes is never removed, nor are the network's outputs and inputs.
    Raises InputError for a network that cannot be followed or in which nothing can be removed.
    """
    try:
        tracer = traced(net, image_shape)
    except Exception as error:  # whatever a network does that tensors without values cannot do
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise _refused(f"this network cannot be followed without computing ({reason})") from error
    _finish(tracer, weights)
    fixed = {tracer.root(a) for a in tracer.fixed}
    roots = [a for a in range(len(tracer.parents)) if tracer.root(a) == a and a not in fixed]
    numbers = {root: number for number, root in enumerate(roots)}

    def numbered(atoms: list[int]) -> Tensor:
        return torch.tensor([numbers.get(tracer.root(a), len(roots)) for a in atoms], dtype=torch.int64)

    found = {name: (rows, columns) for name, rows, columns in reversed(tracer.layers)}
    rows = {n: numbered(found[n][0]) if n in found else torch.full((len(w),), len(roots)) for n, w in weights.items()}
    columns: dict[str, Tensor | None] = {}
    for name, w in weights.items():
        taken = found[name][1] if name in found else None
        columns[name] = None if taken is None or w.dim() < 2 else numbered(taken)
    if not roots:
        raise _refused("every channel of this network is added to, or goes into, something that must keep it")
    origins = torch.full((len(roots) + 1,), -1)
    for number, own in reversed(list(enumerate(rows.values()))):
        origins[own] = number
    vectors = {name: numbered(atoms) for name, atoms in tracer.vectors}
    return Coupling(len(roots), rows, columns, vectors, origins[:-1])


def _finish(tracer: Tracer, weights: Mapping[str, Tensor]) -> None:
    """Join what a weight that is used twice makes and takes; fix what other weights make and take."""
    first: dict[str, list[int] | None] = {}
    for name, rows, columns in tracer.layers:
        if name not in weights:
            tracer.fixed.update([*rows, *(columns or ())])
        if columns is not None and first.setdefault(name, columns) is not None:
            tracer.join(first[name] or (), columns)


def _refused(why: str) -> Exception:
    fix = f"{why}; use kernel, N:M such as 2:4, or weight"
    return bad_value("mask.granularity", "channel", fix)
