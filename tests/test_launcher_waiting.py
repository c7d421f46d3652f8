"""Do commands that are no training say what they do where it takes long, on stderr, and leave nothing behind?"""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from looking_runs import make_run
from sparse_exports import DIGITS, export, network

from ghostmask.benchmarks.timing import scratch
from ghostmask.engine import waiting
from ghostmask.engine.errors import InputError
from ghostmask.engine.waiting import waiting_for
from ghostmask.engine.world import single
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.exporting import forms, packed
from ghostmask.launcher.exporting.exported import read_exported
from ghostmask.launcher.looking import compare, report, runs


class Heard:
    """All that is printed: `until` waits for a line on stderr that says for how long something takes."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self.out, self.err = capsys, "", ""

    def read(self) -> Heard:
        """What was printed since is in `out` and `err`, too."""
        out, err = self._capsys.readouterr()
        self.out, self.err = self.out + out, self.err + err
        return self

    def until(self, what: str) -> None:
        """Return when `what` was said; after 60 s the test fails."""
        deadline = time.monotonic() + 60
        while f"ghostmask: {what}: " not in self.read().err:
            assert time.monotonic() < deadline, self.err
            time.sleep(0.01)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Heard:
    """What is said, after 0.05 s in place of 5."""
    monkeypatch.setattr(waiting, "QUIET_S", 0.05)
    return Heard(capsys)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "waiting"]


def slow(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, heard: Heard, what: str) -> None:
    """Let the function `name` of a module take until it was said that it takes long."""
    whole: Callable[..., object] = getattr(owner, name)

    def lasting(*arguments: Any, **options: Any) -> object:
        heard.until(what)
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, lasting)


def test_it_is_said_while_it_takes_and_not_afterwards(heard: Heard) -> None:
    with waiting_for("onnx of runs/\x1b[2J"):
        heard.until("onnx of runs/\\x1b[2J")
        assert threads()
    assert not threads()
    said = heard.read().err
    time.sleep(0.2)
    assert heard.read().err == said
    assert all(line.endswith(" s so far") for line in said.splitlines())
    assert heard.out == ""


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with waiting_for("nothing"):
        assert threads()
    assert not threads()
    assert time.monotonic() - start > waiting.QUIET_S or capsys.readouterr() == ("", "")


def test_an_error_ends_it_and_is_raised(heard: Heard) -> None:
    def failing() -> None:
        with waiting_for("a format"):
            heard.until("a format")
            raise InputError("no such format")

    with pytest.raises(InputError, match="no such format"):
        failing()
    assert not threads()


@pytest.mark.parametrize("there", [True, False])
def test_a_stderr_that_is_closed_is_no_error(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(waiting, "QUIET_S", 0.01)
    closed = io.StringIO()
    closed.close()
    tried = threading.Event()
    speak = waiting.speak

    def trying(line: str) -> None:
        speak(line)
        tried.set()

    monkeypatch.setattr(waiting, "speak", trying)
    monkeypatch.setattr(sys, "stderr", closed if there else None)
    with waiting_for("a report"):
        assert tried.wait(60)
    assert not failed


def test_runs_are_looked_at_with_a_word_on_stderr(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", finished=False)
    slow(monkeypatch, report, "page", heard, f"drawing the report of {one}")
    assert run_command(["report", str(one)]) == 0
    assert heard.read().out == f"{one / 'report' / 'report.html'}\n"
    slow(monkeypatch, compare, "panels", heard, "comparing 2 runs")
    assert run_command(["compare", str(one), str(two), "--out", str(tmp_path / "both.svg")]) == 0
    assert "so far" not in heard.read().out
    heard.out = ""
    slow(monkeypatch, runs, "stands", heard, "reading the runs")
    assert run_command(["runs", str(tmp_path), "--json"]) == 0
    assert len(json.loads(heard.read().out)) == 2
    assert not threads()


def test_a_format_that_takes_long_is_named(heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path / "net", network("digits_resnet", 10, DIGITS, 0.3), "digits_resnet", DIGITS)
    slow(monkeypatch, packed, "write", heard, f"packed of {tmp_path / 'net'}")
    out = tmp_path / "out"
    assert run_command(["export", str(tmp_path / "net"), "--format", "packed", "--out", str(out)]) == 0
    assert f"{out}: " in heard.read().out
    assert "so far" not in heard.out
    assert not threads()


def test_a_benchmark_of_exports_is_at_one_format_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, world = tmp_path / "net", single()
    export(folder, network("digits_resnet", 10, DIGITS, 0.3), "digits_resnet", DIGITS)
    monkeypatch.setattr(forms, "FORMATS", {name: forms.FORMATS[name] for name in ("packed", "2:4")})
    entered: list[str] = []
    monkeypatch.setattr(world.pulse, "enter", entered.append)
    with scratch() as place:
        forms.write_forms(read_exported(folder), place, world)
    assert entered == [f"{key} of {folder}" for key in ("2:4", "packed, fp16, plain", "packed, fp16, entropy")]
