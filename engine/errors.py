"""What may a user's input do wrong, and how is it said: one line that names the field, the value and the fix."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

LONGEST = 900
"""Characters of an error; of a longer one the middle is left out."""
LONGEST_VALUE = 200
"""Characters of a value in an error."""

SO_FAR, LOADING = " s so far", "loading torch, DeepSpeed and FFCV, which takes some seconds"
"""Ends of lines that say only what is waited for: no reason for anything."""


class InputError(ValueError):
    """Wrong input of the user: the command line prints it as one line and exits with code 2, without a traceback.

    What the user typed, or a file holds, may stand in its message as it is: `printable` goes over it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(cut(printable(message), LONGEST))


class RunStopped(Exception):
    """The run stopped by itself before its end; `exit_code` is the process's exit code (see docs/operations.md)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PeerFailed(Exception):
    """Another rank has failed and says why: this one ends as it does, without a word."""


EXIT_DEFECT = 1
"""An error of the program, with its traceback."""
EXIT_INPUT = 2
"""Wrong input, said in one line; what was there before stays as it was."""
FROM_CHECKPOINT = "start a new run from the last checkpoint: ghostmask train CONFIG --from RUN run=NAME optim.lr=..."
"""The way out where values are not finite: other settings cannot go on with the same run."""
EXIT_NON_FINITE = 3
"""A loss or gradient was not finite; stopped before the optimizer step."""
EXIT_NOT_SAVED = 4
"""The run went to its end, but the disk did not take the last checkpoints, or the export."""
EXIT_NOT_OWNER = 5
"""Another process took the run's folder over while this one was stopped or cut off; it wrote nothing more."""
EXIT_INTERRUPTED = 75
"""SIGTERM, SIGUSR1 or SIGUSR2 arrived; run the same command again to go on (EX_TEMPFAIL)."""
EXIT_LOST = 76
"""A peer is gone without a word (killed, its machine lost, the network cut); run the same command again."""
EXIT_HUNG = 77
"""No rank got any further for train.timeout_minutes; stacks are in RUN/hang; run the same command again."""


def say(text: str) -> None:
    """Print a line on stderr, as `tell` does."""
    tell(f"ghostmask: {text}", sys.stderr)


def tell(text: str, stream: TextIO) -> None:
    """Print a line. A terminal that is closed, or a log whose disk is full, does not end a run of days."""
    with suppress(OSError):
        print(text, file=stream, flush=True)


def to_stderr(text: str) -> None:
    """Print a warning."""
    say(f"warning: {text}")


def printable(text: str) -> str:
    """One line in which all that a terminal does not show as it is (escape sequences, no-break spaces, bytes that are
    not UTF-8) is written as Python escapes it."""
    line = " ".join(text.splitlines())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def cut(text: str, longest: int) -> str:
    """`text` without its middle where it is longer than that."""
    if len(text) <= longest:
        return text
    return f"{text[: longest * 2 // 3]} ... {text[len(text) - longest // 3 + 5 :]}"


def output(text: str) -> None:
    """Print on stdout what a command was called for. Raises InputError where the disk behind it takes nothing."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as of `ghostmask show config | head -1`
        raise
    except OSError as error:
        raise InputError(f"the output could not be written ({error.strerror})") from error


def bad_value(field: str, value: object, fix: str) -> InputError:
    """The error for field = value, e.g. bad_value("mask.density", 1.5, "give a number in (0, 1]")."""
    return InputError(f"{field} = {cut(repr(value), LONGEST_VALUE)}: {fix}")


def unknown_name(field: str, value: object, known: Iterable[str]) -> InputError:
    """The error for a name that is not among the known ones; suggests the nearest and lists all."""
    names = sorted(known)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = cut(repr(value), LONGEST_VALUE)
    return InputError(f"{field} = {shown} is not known: {hint}known: {', '.join(names)}")
