"""The process that writes a .beton, and the file's layout, which is FFCV's: a header, a table, pages, and a list of
what lies on them.

FFCV's own writer waits for ever for the samples of a worker that died (a damaged image, a full disk, no memory), keeps
its table in /dev/shm, starts from the beginning after an interruption, and always encodes anew.
"""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing as mp
import os
import threading
import time
from collections import deque
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType, get_metadata_type
from numpy.typing import NDArray
from tqdm import tqdm

from ghostmask.data_pipelines.photographs.photograph import BadImage
from ghostmask.data_pipelines.source import Images, NamedImages
from ghostmask.data_pipelines.writing.journal import Journal, Records, rows_of, words
from ghostmask.data_pipelines.writing.worker import key_of, name_of, stored, work
from ghostmask.data_pipelines.writing.write import Cost, Written, died
from ghostmask.engine.errors import InputError

CHUNK_IMAGES = 100
SMALLEST_PAGE_BYTES, PAGE_BYTES = 1 << 21, 1 << 23
POLL_S = 0.1
SPARE_ROWS = 1024
"""Room in the table for images that come to an interrupted file: an eighth more, and these."""
FIELDS = {"image": RGBImageField(write_mode="raw"), "label": IntField()}


class Layout(NamedTuple):
    """Where everything lies."""

    page_bytes: int
    start: int
    """Of page 0; the table is before it."""

    @classmethod
    def of(cls, images: Images) -> Layout:
        """FFCV writes whole pages, and an image lies within one. Small for small images: a tiny set need not take
        8 MiB."""
        page_bytes = PAGE_BYTES
        if not isinstance(images, NamedImages):
            one = stored(images, 0)[0].data.size
            page_bytes = max(SMALLEST_PAGE_BYTES, 1 << (one - 1).bit_length())
        table = (len(images) * 9 // 8 + SPARE_ROWS) * _metadata_type().itemsize
        head = HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize
        return cls(page_bytes, -(-(head + table) // page_bytes) * page_bytes)


def measure(images: Images, sample: list[int], parent: Any) -> Cost:
    """What these images cost, by looking at a sample of them."""
    if not isinstance(images, NamedImages):
        return Cost(len(images) * stored(images, 0)[0].data.size, 0.0)
    num_bytes, looked, start = 0, 0, time.monotonic()
    for index in sample:
        try:
            num_bytes += stored(images, index)[0].data.size
            looked += 1
        except BadImage:  # writing will name it
            continue
    seconds = (time.monotonic() - start) / len(sample) * len(images)
    return Cost(round(num_bytes / max(looked, 1) * len(images)), seconds)


def write(
    images: Images, path: Path, *, journal: Path, num_workers: int, name: str | None, identity: str, parent: Any
) -> Written:
    """`write_images` in this process, which must have no threads: it forks the workers. Gives up when `parent` dies."""
    layout = Layout.of(images)
    log = Journal(journal, layout._asdict())
    keys = np.array([words(key_of(images, i, identity)) for i in range(len(images))], dtype=np.uint64)
    if not parent.is_alive():  # then another may be writing there by now
        raise SystemExit(1)
    known = log.read(path)
    rows = rows_of(keys, known)
    known = known[np.unique(rows[rows >= 0])]
    if not len(known):
        path.unlink(missing_ok=True)
    path.touch()
    log.start(known)
    tqdm.set_lock(threading.RLock())  # its own takes room in /dev/shm
    bar = tqdm(total=len(images), initial=len(known), desc=name, unit="img", disable=name is None)
    crew = _Crew(images, np.flatnonzero(rows_of(keys, known) < 0), known, layout, log, bar)
    try:
        crew.run(path, num_workers, identity, parent)
    finally:
        bar.close()
    rows = rows_of(keys, crew.records)
    here = np.flatnonzero(rows >= 0)
    records = crew.records[rows[here]]
    if len(records):
        _finish(path, layout, records)
    return Written(
        hashlib.blake2b(records["content"].tobytes(), digest_size=8).hexdigest(),
        np.bincount(records["label"]).tolist() if len(records) else [],
        [text for _, text in sorted(crew.bad)],
    )


class _Crew:
    """The workers, and what they have said."""

    def __init__(
        self, images: Images, left: NDArray[np.int64], known: Records, layout: Layout, log: Journal, bar: Any
    ) -> None:
        self.images, self.layout, self.log, self.bar = images, layout, log, bar
        self.left = left
        self.done: list[Records] = [known]
        self.bad: list[tuple[int, str]] = []
        used = {int(page) for page in np.unique((known["pointer"] - layout.start) // layout.page_bytes)}
        self.next_page = max(used, default=-1) + 1
        self.free = deque(sorted(set(range(self.next_page)) - used))

    @property
    def records(self) -> Records:
        """Of all samples that are on disk."""
        return np.concatenate(self.done)

    def run(self, path: Path, num_workers: int, identity: str, parent: Any) -> None:
        """Give out the work, and return when all is done. Raises InputError when a worker fails."""
        context = mp.get_context("fork")
        chunk = max(1, min(CHUNK_IMAGES, len(self.left) // (4 * num_workers)))
        chunks = deque(self.left[at : at + chunk] for at in range(0, len(self.left), chunk))
        workers: dict[Connection, tuple[Any, Any]] = {}
        try:
            for _ in range(min(num_workers, len(chunks))):
                here, there = context.Pipe()
                current = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)
                where = {"path": str(path), "parent": os.getpid(), **self.layout._asdict()}
                process = context.Process(
                    target=work, args=(there, self.images, identity, current), kwargs=where, daemon=True
                )
                process.start()
                there.close()
                workers[here] = process, current
            while workers:
                for ready in connection.wait(list(workers), POLL_S):
                    process, current = workers[here := cast(Connection, ready)]
                    try:
                        what, said = here.recv()
                    except (EOFError, ConnectionResetError):
                        process.join()
                        at = name_of(self.images, int(current[0]))
                        raise InputError(f"{died(process.exitcode)}; it was at {at}") from None
                    if self._answer(here, what, said, chunks):
                        workers.pop(here)
                        process.join()
                if not parent.is_alive():
                    raise SystemExit(1)
        finally:
            for process, _ in workers.values():
                process.kill()
                process.join()

    def _answer(self, here: Any, what: str, said: Any, chunks: deque[NDArray[np.int64]]) -> bool:
        """Whether this worker is done."""
        if what == "work":
            here.send(chunks.popleft() if chunks else None)
        elif what == "page":
            self.next_page += not self.free
            here.send(self.free.popleft() if self.free else self.next_page - 1)
        elif what == "written":
            self.log.append(said)
            self.done.append(said)
            self.bar.update(len(said))
        elif what == "bad":
            self.bad.append(said)
            self.bar.update(1)
        elif what == "failed":
            raise InputError(said)
        return bool(what == "done")


def _finish(path: Path, layout: Layout, records: Records) -> None:
    """Write header, table and the list of allocations around the pages that are there."""
    header = np.zeros(1, HeaderType)
    header["version"], header["num_fields"] = CURRENT_VERSION, len(FIELDS)
    header["num_samples"], header["page_size"] = len(records), layout.page_bytes
    pages = int(records["pointer"].max() - layout.start) // layout.page_bytes + 1
    header["alloc_table_ptr"] = end = layout.start + pages * layout.page_bytes
    descriptions = np.zeros(len(FIELDS), FieldDescType)
    for description, (name, field) in zip(descriptions, FIELDS.items(), strict=True):
        description["type_id"] = {kind: number for number, kind in TYPE_ID_HANDLER.items()}[type(field)]
        description["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        description["arguments"] = field.to_binary()[0]
    table = np.zeros(len(records), _metadata_type())
    image, label = table.dtype.names
    table[image]["mode"] = np.where(records["jpeg"], IMAGE_MODES["jpg"], IMAGE_MODES["raw"])
    for field, value in (("width", "width"), ("height", "height"), ("data_ptr", "pointer")):
        table[image][field] = records[value]
    table[label] = records["label"]
    allocations = np.zeros(len(records), ALLOC_TABLE_TYPE)
    allocations["sample_id"], allocations["ptr"] = np.arange(len(records)), records["pointer"]
    allocations["size"] = records["size"]
    with open(path, "r+b") as file:
        file.write(header.tobytes() + descriptions.tobytes() + table.tobytes())
        file.seek(end)
        file.write(allocations.tobytes())
        file.truncate()


def _metadata_type() -> np.dtype[Any]:
    found: np.dtype[Any] = get_metadata_type(list(FIELDS.values()))
    return found
