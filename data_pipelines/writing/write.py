"""How a .beton file is written: in a process of its own, which forks the workers."""

from __future__ import annotations

import signal
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, NamedTuple

from ghostmask.data_pipelines.source import Images
from ghostmask.engine.errors import InputError
from ghostmask.engine.spawn import fork_server

GIVE_UP_S = 5.0
"""How long a writer that was told to end may take to end its workers."""
SAMPLE = 64
"""Images that are looked at to say what all will cost."""


class Cost(NamedTuple):
    """What writing takes, estimated."""

    num_bytes: int
    seconds: float
    """Of one core."""


class Written(NamedTuple):
    """What was written."""

    content: str
    """A digest of images and labels in their order (64 bits, in hex)."""
    counts: list[int]
    """Images of each class."""
    bad: list[str]
    """What is wrong with each image that is left out, in their order."""


def write_images(
    images: Images, path: Path, *, num_workers: int = 1, name: str | None = None, identity: str = ""
) -> Written:
    """Write fields image and label of all images to path, but for those that are bad; name: of the progress bar, None =
    no bar; identity: of images without names of their own.

    What an interrupted call has written is kept, with a list of it beside path, until another goes on. Raises
    InputError for a full disk or a worker that is killed.

    Workers are forked, and a fork of this process would find the locks of its threads (torch, numba, gloo, CUDA) held
    for ever: it is done by a process without threads. The images are pickled once, and shared by the workers.
    """
    job = {"images": images, "path": path, "journal": journal_path(path), "num_workers": num_workers, "name": name}
    written: Written = _apart("write", job | {"identity": identity})
    return written


def measure_images(images: Images) -> Cost:
    """What `write_images` would cost, from a sample spread over the images."""
    step = max(1, len(images) // SAMPLE)
    cost: Cost = _apart("measure", {"images": images, "sample": list(range(step // 2, len(images), step))})
    return cost


def journal_path(partial: Path) -> Path:
    """The list of what is written to a file that is not finished."""
    return partial.with_suffix(".journal")


def died(exit_code: int | None) -> str:
    """What to say of a process that ended with this code and no word."""
    return f"data: a process that wrote the .beton died with exit code {exit_code} (-9 is often too little memory)"


def _apart(function: str, job: dict[str, Any]) -> Any:
    """The result of a function of `writer`, called in a process of its own. Raises its InputError and OSError."""
    here, there = connection.Pipe()
    # Imported before it forks, not by every worker: torchvision's takes seconds.
    writer = fork_server(f"{__package__}.writer", "torchvision.transforms.v2").Process(
        target=_answer, args=(there, function, job)
    )
    writer.start()
    there.close()
    try:
        result, error = here.recv()
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
    return result


def _answer(there: connection.Connection, function: str, job: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    signal.signal(signal.SIGTERM, _leave)
    from ghostmask.data_pipelines.writing import writer

    result, error = None, None
    try:
        result = getattr(writer, function)(**job, parent=parent_process())
    except (InputError, OSError) as known:
        error = known
    there.send((result, error))


def _leave(*_: object) -> None:
    raise SystemExit(1)
