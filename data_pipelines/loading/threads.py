"""Who decides on torch's number of threads: not FFCV, which sets it at import and in every loader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Whatever the body does, torch's number of threads is afterwards what it was before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
