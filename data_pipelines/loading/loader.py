"""How batches come out of one .beton file: FFCV's Loader, with the traps of its iterator closed.

What FFCV 1.0.2 does otherwise: sets torch's thread number for the whole process, waits for ever when its thread fails,
and never ends that thread when an epoch is left early.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline.compiler import Compiler
from numpy.typing import NDArray
from torch import Tensor

from ghostmask.data_pipelines.loading.decode import DamagedImage
from ghostmask.data_pipelines.loading.order import Words
from ghostmask.data_pipelines.loading.readahead import ReadAhead
from ghostmask.data_pipelines.loading.threads import torch_threads_kept
from ghostmask.engine.cores import cores_per_rank, usable_cores
from ghostmask.engine.errors import InputError

BATCHES_AHEAD = 3
JOIN_S = 0.02


_DECODING = threading.Lock()
"""Two loaders share numba's threads; one of numba's threading layers aborts when two threads use it at once."""


class BetonLoader:
    """Batches of one .beton file in any order. Opened once, used for every epoch."""

    def __init__(self, path: Path, decoder: Any, batch_size: int, num_workers: int, num_classes: int) -> None:
        """decoder: an operation of `decode`. Raises InputError if the file's labels are not in [0, num_classes)."""
        self.path, self.batch_size = path, batch_size
        # A compiled decoder needs nothing more from FFCV's compiler, whose wrapper cannot be cached, nor a function
        # that reads: to name its type, FFCV makes numba's own type of a line of bytes read-only, and loses kernels.
        with torch_threads_kept():
            Compiler.set_enabled(False)
            reader, OSCacheManager.compile_reader = OSCacheManager.compile_reader, lambda _: None
            try:
                self._loader = Loader(
                    str(path), batch_size=batch_size, num_workers=usable_threads(num_workers), os_cache=True,
                    drop_last=False, batches_ahead=BATCHES_AHEAD, pipelines={"image": [decoder], "label": None},
                )  # fmt: skip
            finally:
                OSCacheManager.compile_reader = reader
                Compiler.set_enabled(True)
        # Tables of Python sets that only FFCV's other cache uses: 1 GB for ImageNet, in every rank.
        manager = self._loader.memory_manager
        manager.sample_to_pages, manager.page_to_samples, manager.ptr_to_size = {}, {}, {}
        self.labels: NDArray[np.int64] = np.ascontiguousarray(self._loader.reader.metadata["f1"])
        if self.labels.min() < 0 or self.labels.max() >= num_classes:
            raise InputError(f"{path}: labels {self.labels.min()}..{self.labels.max()} are not in [0, {num_classes})")
        pointers, self._page_bytes = self._loader.reader.metadata["f0"]["data_ptr"], int(self._loader.reader.page_size)
        self.pages: NDArray[np.int64] = (pointers // np.uint64(self._page_bytes)).astype(np.int64)
        """Of every sample the page of the file in which its image lies."""
        self._decoder = decoder
        self._open: set[_Epoch] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, rows: Words, side: int = 0, read_ahead: bool = False) -> Generator[tuple[Tensor, Tensor]]:
        """(images (n, H, W, 3) uint8, labels (n,) int64) of the rows (see `order`), batch_size at a time.

        side: of the images, for a decoder of images of any size; 0 = the largest. read_ahead: whether the rows
        go through the file page by page, which are then asked for early, and leave the page cache after use.

        The images lie in a buffer of FFCV's (page-locked where there is CUDA) that is overwritten after the next batch
        has been asked for. Raises InputError for an image that cannot be decoded.
        """
        if not len(rows):
            return
        with torch_threads_kept():
            ahead = self._read_ahead(rows) if read_ahead else None
            epoch = _Epoch(self._loader, rows, self._decoder, side, ahead)
        self._open.add(epoch)
        try:
            for first, (images,) in zip(range(0, len(rows), self.batch_size), epoch, strict=False):
                if first == 0:
                    # FFCV's thread has set torch's thread number by now, which new threads of this process inherit.
                    torch.set_num_threads(torch.get_num_threads())
                labels = self.labels[rows[first : first + self.batch_size, 0]]
                yield torch.from_numpy(images), torch.from_numpy(labels)
            if epoch.error is not None:
                raise self._explained(epoch.error)
        finally:
            epoch.close()
            self._open.discard(epoch)

    def _read_ahead(self, rows: Words) -> ReadAhead:
        return ReadAhead(self.path, self._page_bytes, self.pages[rows[:, 0].astype(np.int64)], self.batch_size)

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, DamagedImage):
            return InputError(
                f"{self.path} is damaged: image {error} cannot be decoded; delete it and prepare it again"
            )
        return error

    def close(self) -> None:
        """End the threads of epochs that were left early and unmap the file."""
        for epoch in list(self._open):
            epoch.close()
        self._open.clear()
        self._loader.memory_manager.context.mmap = None


class _Epoch(EpochIterator):  # type: ignore[misc]  # FFCV has no types
    """One pass over some rows, decoded by a thread."""

    def __init__(self, loader: Any, rows: Words, decoder: Any, side: int, ahead: ReadAhead | None) -> None:
        self.error: BaseException | None = None
        self.decoder, self.side, self.ahead = decoder, side, ahead
        super().__init__(loader, rows)

    def run(self) -> None:
        stream = getattr(self, "current_stream", None)
        if stream is not None:
            # A thread starts on GPU 0, and FFCV's use of streams would take memory there for every rank.
            torch.cuda.set_device(stream.device)
        try:
            super().run()
        except BaseException as error:
            self.error = error
            self.output_queue.put(None)

    def run_pipeline(self, batch: int, *args: Any) -> Any:
        if self.ahead is not None:
            self.ahead.before(batch, self.memory_context.mmap._mmap)
        with _DECODING:
            self.decoder.side = self.side
            return super().run_pipeline(batch, *args)

    def close(self) -> None:
        """End the thread: it may be decoding, or waiting for room in the queue."""
        super().close()
        self.iter_ixes: Iterator[Any] = iter(())
        while self.is_alive() and threading.current_thread() is not self:
            with contextlib.suppress(queue.Empty):
                self.output_queue.get_nowait()
            self.join(JOIN_S)
        if self.ahead is not None:
            self.ahead.close()


def usable_threads(num_workers: int) -> int:
    """num_workers; 0 is this rank's share of the cores. More than there are only wait for each other: then as many as
    there are, with a warning."""
    most = min(usable_cores(), int(numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # numba starts no more
    if num_workers > most:
        warnings.warn(f"data.num_workers = {num_workers}: this machine has {most} cores, {most} are used", stacklevel=2)
    return min(num_workers or cores_per_rank(), most)
