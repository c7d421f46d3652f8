"""Which compiled code is there for a device, how is it loaded, and how is CPU work split over torch's threads?"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from ghostmask.engine.world import World

Result = TypeVar("Result")

_loaded: dict[str, Any] = {}
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def kernels_on(device: torch.device, module: str) -> Any:
    """The kernels of `module` for tensors there, `module`_triton on CUDA and `module`_cpu on the CPU; None where there
    are none, and torch code has to do."""
    form = {"cuda": "triton", "cpu": "cpu"}.get(device.type)
    return load_kernels(f"{module}_{form}") if form else None


def load_kernels(module: str) -> Any:
    """The module of kernels by that name, compiled and tried by its `compile_all()`; None where that fails.

    A failure is a warning, once per process: every kernel has a slower form in torch, which gives the same numbers.
    """
    if module not in _loaded:
        _loaded[module], failure = _compiled(module)
        if failure:
            warnings.warn(f"{module} could not be compiled, slower torch code is used: {failure}", stacklevel=2)
    return _loaded[module]


def agree_on_kernels(world: World, modules: Sequence[str]) -> None:
    """Collective: compile what this device needs of `modules` now; where any rank fails, all use the torch forms.

    Otherwise one rank would be slower than the others by itself, and round differently. One warning, on rank 0, says
    which rank failed and why.
    """
    form = "triton" if world.device.type == "cuda" else "cpu"
    found = {name: _compiled(name) for name in (f"{module}_{form}" for module in modules)}
    failures = world.all_gather_object([f"{module}: {failure}" for module, (_, failure) in found.items() if failure])
    failed = [f"rank {rank}, {failure}" for rank, each in enumerate(failures) for failure in each]
    _loaded.update({module: None if failed else kernels for module, (kernels, _) in found.items()})
    if failed and world.is_main:
        message = f"could not be compiled, slower torch code is used on all ranks: {'; '.join(failed)}"
        warnings.warn(message, stacklevel=2)


def _compiled(module: str) -> tuple[Any, str]:
    """(the module, "") or (None, what failed)."""
    try:
        kernels = importlib.import_module(module)
        kernels.compile_all()
    except Exception as error:
        return None, repr(error)
    return kernels, ""


def split_over_threads(
    work: Callable[[int, int], Result], units: int, smallest: int = 1, *, shares: int = 1
) -> list[Result]:
    """[work(first, end), ...] over ranges that cover [0, units), `shares` of them per torch thread, in order.

    No range is shorter than `smallest` unless it is the only one. A thread that is done takes the next range: with some
    shares each, one that another job holds up does not hold up the others. Not numba's parallel=True: FFCV's loader
    threads run numba code in the same process, and numba's workqueue layer stops the process when two threads enter it.
    """
    ranges = max(1, min(torch.get_num_threads() * shares, units // max(smallest, 1)))
    threads = min(torch.get_num_threads(), ranges)
    if threads == 1:
        return [work(0, units)]
    edges = [units * i // ranges for i in range(ranges + 1)]
    results: dict[int, Result] = {}
    left = iter(range(ranges))  # one after the other, whichever thread asks: the interpreter lock sees to it

    def take() -> None:
        for i in left:
            results[i] = work(edges[i], edges[i + 1])

    others = [_pool(threads).submit(take) for _ in range(threads - 1)]
    take()  # the calling thread works too
    for other in others:
        other.result()
    return [results[i] for i in range(ranges)]


def pieces_in(lengths: Sequence[int], first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, from, to) of what lies in [first, end) of each piece, for pieces of those lengths laid end to end."""
    start = 0
    for number, length in enumerate(lengths):
        low, high = max(first - start, 0), min(end - start, length)
        if low < high:
            yield number, low, high
        start += length


def _pool(threads: int) -> ThreadPoolExecutor:
    """The pool of this process: threads do not survive a fork."""
    key = (os.getpid(), threads)
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(threads - 1, thread_name_prefix="kernels")
    return _pools[key]
