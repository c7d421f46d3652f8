"""How a .beton file is written: in a process of its own, which forks the workers."""

from __future__ import annotations

import signal
from multiprocessing import connection, parent_process, set_start_method
from pathlib import Path
from typing import Any

from ghostmask.data_pipelines.source import Images
from ghostmask.engine.errors import InputError
from ghostmask.engine.spawn import fork_server

GIVE_UP_S = 5.0
"""How long a writer that was told to end may take to remove what it holds in shared memory."""


def write_images(images: Images, path: Path, *, jpeg_fraction: float | None, num_workers: int, name: str | None) -> str:
    """Write fields image and label of all images to path, and return the digest of their content (64 bits, in hex);
    name: of the progress bar, None = no bar.

    jpeg_fraction None: images of one size, all raw. Which of others become JPEG (quality 90) depends on their index
    alone. Raises InputError for an unreadable image or a full disk.

    FFCV's writer forks its workers, and a fork of this process would find the locks of its threads (torch, numba, gloo,
    CUDA) held for ever: it works in a process without threads. The images are pickled once, and shared by the workers.
    """
    here, there = connection.Pipe()
    job = {"images": images, "path": path, "jpeg_fraction": jpeg_fraction, "num_workers": num_workers, "name": name}
    writer = fork_server(f"{__package__}.writer").Process(target=_answer, args=(there, job))
    writer.start()
    there.close()
    try:
        content, error = here.recv()
    except EOFError:
        writer.join()
        raise InputError(died(writer.exitcode)) from None
    finally:
        writer.terminate()
        writer.join(GIVE_UP_S)
        writer.kill()
        here.close()
    if error is not None:
        raise error
    return str(content)


def died(exit_code: int | None) -> str:
    """What to say of a process that ended with this code and no word."""
    return f"data: a process that wrote the .beton died with exit code {exit_code} (-9 is often too little memory)"


def _answer(there: connection.Connection, job: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    signal.signal(signal.SIGTERM, _leave)
    set_start_method("fork", force=True)  # the locks of FFCV's allocator are made for the default way to start
    from ghostmask.data_pipelines.writer import write

    content, error = "", None
    try:
        content = write(**job, parent=parent_process())
    except (InputError, OSError) as known:
        error = known
    there.send((content, error))


def _leave(*_: object) -> None:
    raise SystemExit(1)
