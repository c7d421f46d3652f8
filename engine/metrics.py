"""Where do a run's numbers go: TensorBoard event files and metrics.jsonl, without gaps or repeats after a resume."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ghostmask.engine.appending import Appender
from ghostmask.engine.atomic import replacing, require_file
from ghostmask.engine.errors import InputError, to_stderr
from ghostmask.engine.events import EventFile, event_folder
from ghostmask.engine.world import World

Tag = str | int | float | bool | None

NUM_BUCKETS = 64
_CHUNK = 1 << 22
"""Values that a histogram counts at a time, so that its index tensor stays at 32 MB."""


@dataclass(frozen=True)
class Counts:
    """A distribution that was counted already: values below each of the rising limits (above the one before), their sum
    and their sum of squares."""

    limits: list[float]
    counts: list[int]
    total: float
    squares: float


class MetricWriter:
    """Writes numbers by step on rank 0; every method does nothing on the other ranks.

    folder/metrics.jsonl: one line per call of `scalars`, complete in the file when the call returns.
    folder/events.out.tfevents.*: for TensorBoard, complete after `flush`. Steps are those of `Position.step`.

    A disk that takes nothing stops no run: that is said once in a while, and what waits is written when it does.
    """

    def __init__(
        self, folder: Path | None, world: World, resume_step: int | None, holds: Callable[[], bool] = lambda: True,
        warn: Callable[[str], None] = to_stderr,
    ) -> None:  # fmt: skip
        """folder: None to write nothing. resume_step: the step of the checkpoint that a run goes on from, or None for a
        new run. holds: asked before every line; nothing is written once it says no (see engine.lease).

        What an earlier process wrote for later steps is dropped from metrics.jsonl and hidden in TensorBoard; a new run
        drops and hides everything. metrics.jsonl is a new file then: whoever still writes to the old one is not heard.
        Raises InputError where nothing can be written.
        """
        self._open = folder is not None and world.is_main
        if folder is None or not self._open:
            return
        last_step = -1 if resume_step is None else resume_step
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = folder / "metrics.jsonl"
            _drop_lines_after(lines, last_step)
            # Opened for appending: one write call per line, so that a kill tears the last line at most.
            self._lines = Appender(lines, holds, warn)
            self._step = last_step + 1
            self._events = EventFile(event_folder(folder), self._step, holds, warn)
        except OSError as error:
            raise InputError(
                f"run = {str(folder)!r}: its metrics cannot be written ({error.strerror or error}); free the disk, or "
                "give another run=NAME"
            ) from None

    def settings(self, values: Mapping[str, bool | int | float | str], whole: str) -> None:
        """Show the run's settings in TensorBoard: `values` as hyperparameters, `whole` as text."""
        if self._open:
            self._events.settings(self._step, values, whole)

    def scalars(self, step: int, values: Mapping[str, float], **tags: Tag) -> None:
        """Write `values` by name; tags (phase="search", epoch=3) go into the line of metrics.jsonl only.

        The line is {"step": step, **tags, **values}, a value that is not finite being null. Raises ValueError for a
        value with the name of a tag.
        """
        if not self._open:
            return
        head: dict[str, Tag] = {"step": step, **tags}
        if repeated := head.keys() & values.keys():
            raise ValueError(f"values have the names of tags: {sorted(repeated)}")
        numbers = {name: float(value) for name, value in values.items()}
        line = {name: _finite(value) for name, value in (head | numbers).items()}
        self._lines.write((json.dumps(line, allow_nan=False) + "\n").encode())
        self._lines.push()
        self._events.scalars(step, numbers)

    def histograms(self, step: int, values: Mapping[str, Tensor | Counts], **tags: Tag) -> None:
        """Write distributions by name. Those that were counted, of each layer, are one card per group (the name up to
        its slash) in TensorBoard, of all layers together, and a line of metrics.jsonl: {"step": step, **tags, name:
        counts}.
        """
        if not self._open or not values:
            return
        counted = {name: found for name, found in values.items() if isinstance(found, Counts)}
        for group in dict.fromkeys(name.partition("/")[0] for name in counted):
            c = _together([found for name, found in counted.items() if name.startswith(f"{group}/")])
            first, last = min(c.limits) - 1.0 / len(c.limits), max(c.limits)
            shown = f"{group}/of_weights"
            self._events.histogram(step, shown, first, last, sum(c.counts), c.total, c.squares, c.limits, c.counts)
        if counted:
            line = {"step": step, **tags, **{name: found.counts for name, found in counted.items()}}
            self._lines.write((json.dumps(line, separators=(",", ":")) + "\n").encode())
            self._lines.push()
        for name, found in values.items():
            if isinstance(found, Tensor):
                self.histogram(step, name, found)

    def histogram(self, step: int, name: str, tensor: Tensor) -> None:
        """Write the distribution of a tensor's finite values, counted on the tensor's device in NUM_BUCKETS buckets.

        A tensor without finite values writes nothing.
        """
        if not self._open:
            return
        values = tensor.detach().flatten()
        values = values[torch.isfinite(values)].float()
        if values.numel() == 0:
            return
        low, high = (bound.item() for bound in values.aminmax())
        limits, counts = _buckets(values, low, high)
        total = sum(float(chunk.double().sum()) for chunk in _chunks(values))
        squares = sum(float(chunk.double().square().sum()) for chunk in _chunks(values))
        numel, bounds = values.numel(), limits.tolist()
        self._events.histogram(step, name, low, high, numel, total, squares, bounds, counts.tolist())

    def flush(self) -> None:
        """Bring everything written so far to disk: call it before a checkpoint of this step is published."""
        if self._open:
            self._lines.sync()
            self._events.file.sync()

    def close(self) -> None:
        """Flush and close the files; later calls of any method do nothing."""
        if self._open:
            self._lines.close()
            self._events.file.close()
            self._open = False


def _together(layers: Sequence[Counts]) -> Counts:
    """The distribution of all values. Raises ValueError where limits differ."""
    limits = layers[0].limits
    if any(layer.limits != limits for layer in layers):
        raise ValueError("histograms of one group have other limits")
    sums = [sum(column) for column in zip(*(layer.counts for layer in layers), strict=True)]
    return Counts(limits, sums, sum(one.total for one in layers), sum(one.squares for one in layers))


def _drop_lines_after(path: Path, last_step: int) -> None:
    """Keep the whole lines of metrics.jsonl with step <= last_step; a line torn by a kill is dropped."""
    with replacing(path) as writing, writing.open("wb") as kept:
        if path.exists():
            require_file(path)
            shutil.copymode(path, writing)
            with path.open("rb") as old:
                kept.writelines(line.rstrip(b"\n") + b"\n" for line in old if _step_of(line) <= last_step)


def _step_of(line: bytes) -> float:
    """The step of a line, infinite for one that is not whole."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _finite(value: Tag) -> Tag:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _buckets(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(upper limits, counts) of NUM_BUCKETS equal buckets over [low, high], of one where low == high."""
    if low == high:
        return torch.tensor([high], dtype=torch.float64), torch.tensor([values.numel()])
    limits = torch.linspace(low, high, NUM_BUCKETS + 1, dtype=torch.float64)[1:]
    counts = torch.zeros(NUM_BUCKETS, dtype=torch.int64, device=values.device)
    for chunk in _chunks(values):
        # Integer counts: exact above 2^24 values and deterministic on CUDA, which torch.histc is not.
        index = ((chunk.double() - low) * (NUM_BUCKETS / (high - low))).long().clamp_(max=NUM_BUCKETS - 1)
        counts += torch.bincount(index, minlength=NUM_BUCKETS)
    return limits, counts


def _chunks(values: Tensor) -> tuple[Tensor, ...]:
    return torch.split(values, _CHUNK)
