"""How is something timed fairly on a machine that is not ours alone: interleaved repeats, medians, measured floors."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import TYPE_CHECKING

import torch

from ghostmask.benchmarks.row import Row
from ghostmask.engine.world import World

if TYPE_CHECKING:
    from ghostmask.benchmarks.export import Exports

Work = Callable[[], object]
COPY_ELEMENTS = 1 << 26
PAUSE_CYCLES = 100_000_000
"""Of a GPU's clock, about 50 ms, in which the host queues launches (the driver takes about 1000 of them)."""


@dataclass(frozen=True)
class Bench:
    """What a benchmark is run with: quick = sizes that take seconds, for tests; its numbers mean nothing. exports: what
    `ghostmask bench export RUN` looks at."""

    world: World
    quick: bool
    exports: Exports | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.world.device


def interleaved(
    work: Mapping[str, Work],
    repeats: int,
    device: torch.device,
    prepare: Mapping[str, Work] | None = None,
    warm_up: int = 1,
    settle: bool = False,
) -> dict[str, float]:
    """Median seconds of every piece of work: one after the other, again and again, so that a slow minute hits all.

    prepare: untimed, before each repeat of the work of that name; settle: run the work untimed before each repeat, so
    that it finds its own memory there (to give what another work has freed back to the system takes up to 60 ms).
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(-warm_up, repeats):
        for name, function in work.items():
            if prepare and name in prepare:
                prepare[name]()
            if settle:
                function()
            _wait(device)
            start = perf_counter()
            function()
            _wait(device)
            if repeat >= 0:
                seconds[name].append(perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def device_seconds(
    work: Mapping[str, Work], repeats: int, prepare: Mapping[str, Work] | None = None
) -> dict[str, float]:
    """Median seconds that the CUDA device needs for every piece of work, in turns, its launches queued beforehand.

    prepare: as in `interleaved`.

    What counts in a step, where the host runs ahead of the device; `interleaved` counts the host's time too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(-1, repeats):
        for name, function in work.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            if prepare and name in prepare:
                prepare[name]()
            torch.cuda.synchronize()
            torch.cuda._sleep(PAUSE_CYCLES)  # type: ignore[no-untyped-call]
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 0:
                seconds[name].append(start.elapsed_time(end) / 1000)
    return {name: median(values) for name, values in seconds.items()}


def copy_bandwidth(device: torch.device, quick: bool = False) -> float:
    """Bytes read and written per second by a large copy: the floor of whatever must move bytes."""
    elements = COPY_ELEMENTS >> 6 if quick else COPY_ELEMENTS
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    work: dict[str, Work] = {"copy": lambda: target.copy_(source)}
    return 2 * 4 * elements / interleaved(work, 5, device, warm_up=2)["copy"]


def peak_extra_bytes(work: Work, device: torch.device, *, warm_up: bool = True) -> int:
    """Most memory that is held while `work` runs, beyond what was held before; after one run to warm up, if wanted.

    CUDA: the allocator's count. CPU: resident memory of this process, looked at by a thread every millisecond.
    """
    if warm_up:
        work()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # what earlier work has freed and the C library kept would hide what this work takes
        trim(0)
    watch = _ResidentMemory()
    work()
    return watch.stop()


class _ResidentMemory(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = _resident_bytes()
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, _resident_bytes())
            sleep(0.001)

    def stop(self) -> int:
        self.done.set()
        self.join()
        return max(self.most, _resident_bytes()) - self.before


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for large files under runs/, where a run's own files would be; gone at the end."""
    runs = Path("runs").absolute()
    runs.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=runs, prefix=".bench-") as folder:
        yield Path(folder)


def machine() -> Row:
    """What the numbers depend on, as the first row of every table: value = the machine's load in the last minute."""
    cores = len(os.sched_getaffinity(0))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    note = (
        f"{_cpu()}, {cores} cores, {torch.get_num_threads()} torch threads{gpu}; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    return Row("machine", os.getloadavg()[0], "processes running", note=note)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
