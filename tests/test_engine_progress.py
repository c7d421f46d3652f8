"""Is a run's progress readable on a terminal (a real pseudo-terminal), in a log file, and silent on other ranks?"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ghostmask.engine.progress import Progress
from ghostmask.engine.world import World, single

FIELDS: dict[str, float | str] = {
    "phase": "search",
    "epoch": "3/300",
    "loss": 0.31234,
    "accuracy": 0.5,
    "density": 0.05,
    "images/s": 12345.6,
}


class Terminal:
    """The writing end of a pseudo-terminal of 24 rows, and everything that was written to it."""

    def __init__(self, columns: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self._seen = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:
                return
            if not data:
                return
            self._seen += data

    def close(self) -> None:
        self.stream.close()
        self._reader.join()
        os.close(self._master)

    def screen(self) -> list[str]:
        """The rows as a person sees them at the end."""
        rows, column = [""], 0
        for character in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self._seen.decode()):
            if character == "\r":
                column = 0
            elif character == "\n":
                rows.append("")
            else:
                rows[-1] = rows[-1][:column].ljust(column) + character + rows[-1][column + 1 :]
                column += 1
        return [row.rstrip() for row in rows]


@contextmanager
def _terminal(columns: int = 140) -> Iterator[Terminal]:
    terminal = Terminal(columns)
    try:
        yield terminal
    finally:
        if not terminal.stream.closed:
            terminal.close()


def test_a_terminal_shows_one_bar_that_is_updated_in_place() -> None:
    with _terminal() as terminal:
        progress = Progress(single(), 200, terminal.stream)
        for step in (50, 100, 150):
            progress.update(step, FIELDS)
            time.sleep(0.12)
        progress.close()
        terminal.close()
        rows = terminal.screen()
    assert len(rows) == 2
    assert rows[1] == ""
    assert re.fullmatch(
        r"search 3/300 \|.{10}\|  75% 00:00 left, loss 0\.3123, accuracy 0\.5, density 0\.05, images/s 12346", rows[0]
    )


def test_messages_stand_above_the_bar_and_garble_neither() -> None:
    with _terminal() as terminal:
        progress = Progress(single(), 10, terminal.stream)
        progress.message("before")
        progress.update(4, FIELDS)
        progress.message("epoch 1: 91 %")
        progress.update(5, FIELDS)
        progress.message("epoch 2: 92 %")
        progress.close()
        terminal.close()
        rows = terminal.screen()
    assert rows[:3] == ["before", "epoch 1: 91 %", "epoch 2: 92 %"]
    assert rows[3].startswith("search 3/300 |")
    assert " 50% " in rows[3]
    assert rows[4:] == [""]


def test_a_narrow_terminal_still_shows_the_time_left_on_one_row() -> None:
    with _terminal(columns=50) as terminal:
        progress = Progress(single(), 10, terminal.stream)
        progress.update(1, FIELDS)
        time.sleep(0.12)
        progress.update(2, FIELDS)
        progress.close()
        terminal.close()
        rows = terminal.screen()
    assert len(rows) == 2
    assert re.search(r" 20% \d\d:\d\d left", rows[0])
    assert len(rows[0]) <= 50


def test_time_left_after_a_resume_is_reckoned_from_where_it_resumed() -> None:
    with _terminal() as terminal:
        progress = Progress(single(), 1_000_000, terminal.stream)
        progress.update(999_000, FIELDS)  # at the rate of 999,000 steps in no time nothing would be left
        time.sleep(0.5)
        progress.update(999_050, FIELDS)
        progress.close()
        terminal.close()
        (left,) = re.findall(r"00:(\d\d) left", terminal.screen()[0])
    assert 7 <= int(left) <= 20  # 950 steps at 50 in half a second: 9.5 s


def test_a_log_file_gets_one_line_per_call() -> None:
    stream = io.StringIO()
    progress = Progress(single(), 200, stream)
    progress.update(50, FIELDS)
    progress.message("epoch 1: 91 %")
    time.sleep(0.05)
    progress.update(100, FIELDS | {"loss": float("nan")})
    progress.close()
    first, message, second, rest = stream.getvalue().split("\n")
    assert first == "step 50/200 search epoch 3/300 loss 0.3123 accuracy 0.5 density 0.05 images/s 12346"
    assert message == "epoch 1: 91 %"
    assert re.fullmatch(r"step 100/200 search epoch 3/300 loss nan .* images/s 12346 0:00:00 left", second)
    assert rest == ""


def test_a_log_files_time_left_is_that_of_the_rate_since_the_first_update() -> None:
    stream = io.StringIO()
    progress = Progress(single(), 1100, stream)
    progress.update(1000, {})
    time.sleep(0.2)
    progress.update(1002, {})
    (left,) = re.findall(r"0:00:(\d\d) left", stream.getvalue())
    assert 9 <= int(left) <= 20  # 98 steps at 0.1 s


def test_other_ranks_show_nothing() -> None:
    with _terminal() as terminal:
        progress = Progress(World(1, 2, torch.device("cpu")), 10, terminal.stream)
        progress.update(1, FIELDS)
        progress.message("hello")
        progress.close()
        terminal.close()
        assert terminal.screen() == [""]


def test_a_log_that_cannot_be_written_does_not_end_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1)
    progress = Progress(single(), 10, stream)
    progress.update(1, FIELDS)
    progress.message("still here")
    progress.close()
    progress.update(2, FIELDS)


def test_closing_twice_does_nothing() -> None:
    with _terminal() as terminal:
        progress = Progress(single(), 10, terminal.stream)
        progress.update(1, FIELDS)
        progress.close()
        progress.close()
        progress.update(2, FIELDS)
        terminal.close()
        assert len(terminal.screen()) == 2
