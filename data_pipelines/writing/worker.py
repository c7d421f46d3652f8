"""A process that looks at images and fills pages of a .beton with them: what it is told by, and what it tells.

It asks for chunks of indices ("work") and for the number of a free page ("page"), and says what is on a page that the
disk has ("written"), which images are bad ("bad"), that it is done ("done"), or why it cannot go on ("failed").
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostmask.data_pipelines.photographs.photograph import BadImage
from ghostmask.data_pipelines.source import Images, NamedImages, Stored
from ghostmask.data_pipelines.writing.journal import sealed, words
from ghostmask.engine.errors import InputError

DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def key_of(images: Images, index: int, identity: str) -> bytes:
    """16 bytes that tell a sample from all others; identity: of images that have no names."""
    if isinstance(images, NamedImages):
        return images.key(index)
    return hashlib.blake2b(f"{identity} {index}".encode(), digest_size=16).digest()


def name_of(images: Images, index: int) -> str:
    """What a message calls it."""
    return images.name(index) if isinstance(images, NamedImages) else f"image {index}"


def stored(images: Images, index: int) -> tuple[Stored, int]:
    """(the image as it is kept, its label). Raises BadImage."""
    image, label = images[index]
    if not isinstance(image, Stored):
        pixels = np.ascontiguousarray(image)
        image = Stored(pixels, pixels.shape[0], pixels.shape[1], f"{pixels.shape}".encode() + pixels.tobytes())
    return image, label


class Page:
    """The page that is being filled."""

    def __init__(self, file: int, start: int, num_bytes: int, number: Callable[[], int]) -> None:
        """file: descriptor of the partial file; start: of page 0; number(): of the next free page."""
        self.file, self.start, self.number = file, start, number
        self.buffer = np.zeros(num_bytes, np.uint8)
        self.used = 0
        self.samples: list[tuple[Any, ...]] = []

    def add(self, key: bytes, image: Stored, label: int) -> NDArray[np.void] | None:
        """Put it on the page; where it does not fit, on the next: then the records of the one that is now on disk."""
        data = image.data.reshape(-1)
        written = self.write() if self.used + data.size > self.buffer.size else None
        self.buffer[self.used : self.used + data.size] = data
        content = hashlib.blake2b(f"{label}\0".encode() + image.content, digest_size=16).digest()
        jpeg = image.data.ndim == 1
        sample = words(key), words(content), self.used, data.size, label, image.height, image.width, jpeg
        self.samples.append(sample)
        self.used += data.size
        return written

    def write(self) -> NDArray[np.void] | None:
        """Bring the page to disk; its records, if there is anything on it."""
        if not self.samples:
            return None
        self.buffer[self.used :] = 0
        at = self.start + self.number() * self.buffer.size
        left = memoryview(self.buffer.data)
        while left:
            left = left[os.pwrite(self.file, left, at + self.buffer.size - len(left)) :]
        os.fdatasync(self.file)
        records = sealed([(key, content, at + place, *rest) for key, content, place, *rest in self.samples])
        self.used, self.samples = 0, []
        return records


def work(
    here: Connection,
    images: Images,
    identity: str,
    current: Any,
    *,
    path: str,
    start: int,
    page_bytes: int,
    parent: int,
) -> None:
    """The whole life of a worker. current: a number in shared memory, of the image that it looks at."""
    _die_with(parent)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        page = Page(file, start, page_bytes, lambda: int(_asked(here, "page")))
        while (chunk := _asked(here, "work")) is not None:
            for index in chunk:
                current[0] = index
                _one(here, page, images, int(index), identity)
        _tell(here, page.write())
        here.send(("done", None))
    except (EOFError, BrokenPipeError):
        raise SystemExit(1) from None  # nobody is there to be told
    except InputError as error:
        _fail(here, str(error))
    except OSError as error:
        _fail(here, f"data.root: {os.path.dirname(path)} cannot be written to ({error.strerror or error})")
    except Exception:
        _fail(here, f"data: writing {name_of(images, int(current[0]))} failed: {traceback.format_exc()}")


def _one(here: Connection, page: Page, images: Images, index: int, identity: str) -> None:
    try:
        image, label = stored(images, index)
        if image.data.size > page.buffer.size:
            raise BadImage(
                f"{name_of(images, index)} takes {image.data.size:,} bytes, more than FFCV's page of "
                f"{page.buffer.size:,}; give a smaller data.max_resolution, or shrink it"
            )
    except BadImage as error:
        here.send(("bad", (index, str(error))))
        return
    _tell(here, page.add(key_of(images, index, identity), image, label))


def _asked(here: Connection, what: str) -> Any:
    here.send((what, None))
    return here.recv()


def _tell(here: Connection, records: NDArray[np.void] | None) -> None:
    if records is not None:
        here.send(("written", records))


def _fail(here: Connection, text: str) -> None:
    here.send(("failed", text))
    raise SystemExit(1)


def _die_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever: let the kernel kill it too (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which kills its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
