"""The process that writes a .beton, and its workers: FFCV's DatasetWriter, made to stop when one of them fails.

FFCV's own loop waits for ever for the samples of a worker that died (a damaged image, a full disk, no memory), draws
which images become JPEG from an unseeded generator, and cannot be silenced.
"""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing as mp
import os
import queue
import signal
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.memory_allocator import MemoryAllocator
from ffcv.utils import chunks
from ffcv.writer import DatasetWriter, handle_sample
from tqdm import tqdm

from ghostmask.data_pipelines import order
from ghostmask.data_pipelines.source import Images
from ghostmask.data_pipelines.write import died
from ghostmask.engine.errors import InputError

CHUNK_IMAGES = 100
SMALLEST_PAGE_BYTES, PAGE_BYTES = 1 << 21, 1 << 23
POLL_S = 0.1
SHARED_MEMORY_FULL = "/dev/shm cannot hold the .beton's table of images; make it larger (docker run --shm-size)"
DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def write(
    images: Images, path: Path, *, jpeg_fraction: float | None, num_workers: int, name: str | None, parent: Any
) -> str:
    """`write_images` in this process, which must have no threads: it forks the workers. Gives up when `parent` dies."""
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    writer = _Writer(str(path), fields, page_size=_page_bytes(images, jpeg_fraction is None), num_workers=num_workers)
    bar = tqdm(total=len(images), desc=name, unit="img", disable=name is None)
    return writer.write(images, jpeg_fraction, bar, parent)


def _page_bytes(images: Images, one_size: bool) -> int:
    """FFCV writes whole pages, and an image lies within one. Small for small images: a tiny set need not take 8 MiB."""
    if not one_size:
        return PAGE_BYTES
    image_bytes = images[0][0].nbytes
    return max(SMALLEST_PAGE_BYTES, 1 << (image_bytes - 1).bit_length())


class _Writer(DatasetWriter):  # type: ignore[misc]  # FFCV has no types
    def write(self, images: Images, jpeg_fraction: float | None, bar: Any, parent: Any) -> str:
        """FFCV's _write_common with the workers watched; returns the content's digest."""
        self.num_samples = len(images)
        context = mp.get_context("fork")  # the allocator holds locks made for it; images need not be picklable
        try:
            self.prepare()
            work, allocations, errors = context.Queue(), context.Queue(), context.Queue()
            done = context.Value(ctypes.c_uint64, 0)
        except OSError as error:
            self._give_up_shared_memory()
            if error.filename is not None:
                raise
            raise InputError(f"data: {SHARED_MEMORY_FULL} ({error.strerror})") from error
        for chunk in [*chunks(range(self.num_samples), CHUNK_IMAGES), *[None] * self.num_workers]:
            work.put(chunk)
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        shared = {"work": work, "allocator": allocator, "done": done, "allocations": allocations, "errors": errors}
        workers = [
            context.Process(
                target=_write_share,
                args=(self, images, jpeg_fraction),
                kwargs=shared | {"parent": os.getpid()},
                daemon=True,
            )
            for _ in range(self.num_workers)
        ]
        try:
            for worker in workers:
                worker.start()
            shares = _watch(workers, done, allocations, errors, bar, parent)
            self.finalize([allocation for allocated, _ in shares for allocation in allocated])
            return f"{sum(digest for _, digest in shares) % 2**64:016x}"
        finally:
            bar.close()
            for worker in workers:
                worker.kill()
                worker.join()
            work.cancel_join_thread()
            self._give_up_shared_memory()

    def _give_up_shared_memory(self) -> None:
        if hasattr(self, "metadata_sm"):
            self.metadata_sm.close()
            self.metadata_sm.unlink()


def _watch(
    workers: list[Any], done: Any, allocations: Any, errors: Any, bar: Any, parent: Any
) -> list[tuple[list[Any], int]]:
    """All workers' allocations and digests, once each has handed in its own. Raises InputError when one fails."""
    shares: list[tuple[list[Any], int]] = []
    while len(shares) < len(workers):
        try:
            shares.append(allocations.get(timeout=POLL_S))
        except queue.Empty:
            dead = [w.exitcode for w in workers if w.exitcode not in (None, 0)]
            if dead:
                raise InputError(_reason(errors, dead[0])) from None
            if not parent.is_alive():
                raise SystemExit(1) from None
        if done.value > bar.n:
            bar.update(done.value - bar.n)
    return shares


def _reason(errors: Any, exit_code: int) -> str:
    try:
        return str(errors.get(timeout=1.0))
    except queue.Empty:
        if exit_code == -signal.SIGBUS:  # a page of shared memory that is not there when it is touched
            return f"data: {SHARED_MEMORY_FULL}"
        return died(exit_code)


def _write_share(
    writer: _Writer, images: Images, jpeg_fraction: float | None, *, parent: int,
    work: Any, allocator: Any, done: Any, allocations: Any, errors: Any,
) -> None:  # fmt: skip
    """A worker: encode chunks of images until there are none left."""
    _die_with(parent)
    try:
        metadata = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type)
        as_jpeg = order.sample_words(0, 0, np.arange(len(images)), order.STORAGE) < (jpeg_fraction or 0.0) * 2.0**64
        field = writer.fields["image"]
        digest = 0
        with allocator:
            while (chunk := work.get()) is not None:
                for index in chunk:
                    image, label = images[index]
                    digest += _digest(index, image, label)
                    # A raw image larger than FFCV's page could not be stored at all.
                    field.write_mode = "jpg" if as_jpeg[index] or image.nbytes > writer.page_size else "raw"
                    handle_sample((image, label), index, metadata.dtype.names, metadata, allocator, writer.fields)
                with done.get_lock():
                    done.value += len(chunk)
        allocations.put((allocator.allocations, digest))
    except InputError as error:
        errors.put(str(error))
        raise SystemExit(1) from error
    except OSError as error:
        errors.put(f"data.root: {writer.fname} could not be written ({error})")
        raise SystemExit(1) from error
    except Exception as error:
        errors.put(f"data: writing {writer.fname} failed: {traceback.format_exc()}")
        raise SystemExit(1) from error


def _digest(index: int, image: np.ndarray[Any, Any], label: int) -> int:
    """64 bits of one sample: of all of them the sum counts, which no order of the workers changes."""
    head = f"{index} {label} {image.shape}".encode()
    return int.from_bytes(hashlib.blake2b(head + image.tobytes(), digest_size=8).digest(), "little")


def _die_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever: let the kernel kill it too (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which kills its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
