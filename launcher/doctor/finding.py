"""What does one check of the doctor find: pass, warn or fail, with the fix, from one rank and from all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghostmask.engine.errors import printable

if TYPE_CHECKING:
    from ghostmask.launcher.doctor.patient import Patient

LEVELS = ("pass", "skip", "warn", "fail")
"""From the best to the worst; skip: what it needs has failed."""


@dataclass(frozen=True)
class Finding:
    """level: of LEVELS; text: what was found, in a few words; fix: what to do, "" where there is nothing to do."""

    level: str
    text: str
    fix: str = ""

    def line(self, name: str) -> str:
        """The one line that is printed."""
        return printable(f"{self.level}  {name:10}  {self.text}{f': {self.fix}' if self.fix else ''}")


@dataclass(frozen=True)
class Check:
    """A name, the function that looks, on every rank at once, and the checks without which it cannot."""

    name: str
    look: Callable[[Patient], Finding]
    needs: tuple[str, ...] = ()
    together: bool = False
    """Whether the ranks wait for each other in it: then a rank that fails must end them all."""


def passed(text: str) -> Finding:
    """Nothing to do."""
    return Finding("pass", text)


def warned(text: str, fix: str) -> Finding:
    """The run would work, but not as it should."""
    return Finding("warn", text, fix)


def failed(text: str, fix: str = "") -> Finding:
    """The run would not work."""
    return Finding("fail", text, fix)


def worst(findings: Sequence[Finding], whom: Callable[[list[int]], str]) -> Finding:
    """The findings of all ranks as one: rank 0's where all are alike, else the worst, with the ranks that found it.

    whom: ranks in words, "" for all of them.
    """
    level = max((finding.level for finding in findings), key=LEVELS.index)
    found = [rank for rank, finding in enumerate(findings) if finding.level == level]
    finding = findings[found[0]]
    ranks = whom(found)
    return Finding(level, f"{ranks}: {finding.text}", finding.fix) if ranks and level != "pass" else finding
