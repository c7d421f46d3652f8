"""Which checkpoint does `--from RUN[@STEP]` mean?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ghostmask.engine.errors import InputError
from ghostmask.launcher import locate


@dataclass(frozen=True)
class Source:
    """A checkpoint of another run to start from: the run's folder, and a step of it (None: the newest)."""

    folder: Path
    step: int | None = None

    def __str__(self) -> str:
        return str(self.folder) if self.step is None else f"{self.folder}@{self.step}"


def find_source(text: str) -> Source:
    """The source of RUN or RUN@STEP. Raises InputError where there is no such run."""
    run, at, step = text.rpartition("@")
    if not at:
        return Source(locate.find_run(text))
    if not step.isdecimal() or len(step) > 18:
        raise InputError(f"--from {text}: give RUN, or RUN@STEP with the step of a checkpoint, such as {run}@1000")
    return Source(locate.find_run(run), int(step))
