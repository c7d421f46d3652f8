"""In which order do the elements of a tensor lie in memory, and how is a tensor read or filled in another's order?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether the elements lie in memory as they are numbered, or in channels_last order."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def same_order(tensor: Tensor, like: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same way."""
    here, there = tensor.stride(), like.stride()
    return here == there or all(a == b or size == 1 for a, b, size in zip(here, there, like.shape, strict=True))


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, or where it lies in another order than `like` or is of another type, a copy that is like `like`.

    like: of the same shape, its elements without gaps in memory, as those of `torch.empty_like` are.
    """
    if tensor.dtype == like.dtype and same_order(tensor, like):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def in_memory(tensor: Tensor) -> Tensor:
    """A view, (n,), of a tensor without gaps: its elements as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


@contextmanager
def filled(outs: Sequence[Tensor], like: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of the type and order of `like` for the caller to fill; those that are not `outs` are copied there."""
    targets = [
        out if out.dtype == w.dtype and same_order(out, w) else torch.empty_like(w)
        for out, w in zip(outs, like, strict=True)
    ]
    yield targets
    for out, target in zip(outs, targets, strict=True):
        if target is not out:
            out.copy_(target)
