"""ghostmask watch: a run as it goes, in the terminal, from its files alone: it may run anywhere that they can be seen
from."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ghostmask.engine.errors import output
from ghostmask.launcher.cluster.status import OVER
from ghostmask.launcher.looking.diagnosis import diagnosis
from ghostmask.launcher.looking.read import Curve, Seen, look, thinned
from ghostmask.launcher.looking.runs import age, progress, written
from ghostmask.launcher.looking.wanted import require

if TYPE_CHECKING:
    from rich.console import RenderableType

LOOK_S = 2.0
"""Between two looks at the run's files."""
SILENT_S = 120.0
"""A run elsewhere that changes no file for so long, not its lease either, is taken for ended."""
BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = (
    ("train/loss", "training loss", "{:.4g}"), ("eval/accuracy", "test accuracy", "{:.2%}"),
    ("mask/density", "density", "{:.4g}"), ("mask/decided_fraction", "decided", "{:.1%}"),
    ("mask/temperature", "temperature", "{:.3g}"), ("speed/images_per_s", "images/s", "{:,.0f}"),
    ("speed/data_wait_fraction", "waited for data", "{:.1%}"),
)  # fmt: skip


def watch(folder: Path, *, every_s: float = LOOK_S, once: bool = False) -> int:
    """Show the run until it ends (once: a single time); returns 0.

    On a terminal in place, elsewhere a plain line whenever something changed, and the diagnosis at the end.
    """
    if sys.stdout.isatty():
        return _live(folder, every_s, once)
    shown, signs = "", Signs(folder)
    while True:
        start = time.monotonic()
        seen = look(folder)
        if (line := plain(seen)) != shown:
            shown = line
            output(line)
        if once or signs.are_over(seen.stands.state):
            for text in [*seen.doubts, *diagnosis(seen)]:
                output(f"{seen.name}: {text}")
            return 0
        _pause(every_s, time.monotonic() - start)


class Signs:
    """What a run changes as long as it lives, wherever that is: its owner renews the lease, its metrics grow."""

    def __init__(self, folder: Path, silent_s: float = SILENT_S) -> None:
        self.folder, self.silent_s = folder, silent_s
        self._seen, self._since = self._look(), time.monotonic()

    def are_over(self, state: str) -> bool:
        """Whether a run that stands so has ended, as far as one can know."""
        if (now := self._look()) != self._seen:
            self._seen, self._since = now, time.monotonic()
        return state in OVER or (state == "unknown" and time.monotonic() - self._since > self.silent_s)

    def _look(self) -> list[tuple[int, int]]:
        found = []
        for path in (*sorted((self.folder / ".lease").glob("*")), self.folder / "metrics.jsonl"):
            with suppress(OSError):
                found.append((path.stat().st_mtime_ns, path.stat().st_size))
        return found


def plain(seen: Seen) -> str:
    """The run in one line."""
    step, accuracy, density = progress(seen.stands)
    loss = seen.last("train/loss")
    parts = [
        f"step {step}" if step else "", seen.stands.phase, "" if loss is None else f"loss {loss:.4g}",
        f"accuracy {accuracy}" if accuracy else "", f"density {density}" if density else "", _left(seen),
    ]  # fmt: skip
    return f"{seen.name}: {seen.stands.state} " + " ".join(part for part in parts if part)


def spark(points: Curve, width: int) -> str:
    """A curve in one line of text, from its smallest value to its largest."""
    values = [value for _, value in thinned(points, width)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def screen(seen: Seen, width: int) -> RenderableType:
    """What a terminal of so many columns shows."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    step, _, _ = progress(seen.stands)
    where = f" on {seen.stands.where}" if seen.stands.where else ""
    head = f"{seen.name}  {seen.stands.state}{where}  {seen.stands.phase}  step {step or '-'}  {_left(seen)}"
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    for key, title, layout in CURVES:
        if points := seen.curve(key):
            table.add_row(title, layout.format(points[-1][1]), spark(points, max(10, width - 34)))
    ago = age(time.time() - written(seen.folder))
    words = [seen.stands.why, *seen.doubts, *diagnosis(seen)]
    return Group(
        Text(head, style="bold"), _bar(seen), table, Text(f"last written {ago}", style="dim"),
        *(Text(text, style="yellow") for text in words if text),
    )  # fmt: skip


def _bar(seen: Seen) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    row = Table.grid(expand=True)  # a bar by itself ends no line
    row.add_row(ProgressBar(total=seen.stands.total_steps or 1, completed=seen.stands.step or 0))
    return row


def _live(folder: Path, every_s: float, once: bool) -> int:
    require("rich")
    from rich.console import Console
    from rich.live import Live

    console, signs = Console(), Signs(folder)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            start = time.monotonic()
            seen = look(folder)
            live.update(screen(seen, console.width), refresh=True)
            if once or signs.are_over(seen.stands.state):
                return 0
            _pause(every_s, time.monotonic() - start)


def _pause(every_s: float, took_s: float) -> None:
    """A long run's files take a while to read: most of the time is left to others."""
    time.sleep(max(every_s, 4 * took_s))


def _left(seen: Seen) -> str:
    left = seen.stands.seconds_left
    return "" if left is None else f"{timedelta(seconds=round(left))} left"
